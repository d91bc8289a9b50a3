"""The first kernel: the [c, c] matrices of every chunk, all chunks at once."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.delta_rule.chunk import CHUNK
from pallas_kernels.delta_rule.gpu import tensor_core as tc
from pallas_kernels.delta_rule.gpu.shapes import Call

ROWS = 6  # coarse, fine, document, beta, key factor, query factor


class Matrices(NamedTuple):
    """[B, H, n, c, c] bfloat16 each."""

    solve_high: Any  # (I + L)^-1 diag(beta), in two parts
    solve_low: Any
    attend: Any  # scale q_i' k_j with decays, j <= i
    inverse: Any  # (I + L)^-1, for the backward pass, or None


def unit_lower_inverse(lower: jax.Array, room: Any, simulated: Any) -> jax.Array:
    """(I + lower)^-1 by doubling the blocks that are inverted: X - X L_off X joins pairs of them.

    X is zero outside of its blocks, so X L needs no mask before the product: masked after it, it is X L_off. `room` is
    for L and X, each in two parts. Every product is three bfloat16 passes.
    """
    i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=tc.LAYOUT) for axis in (0, 1))
    room[0], room[1] = tc.split(lower)
    inverse = jnp.where(i == j, 1.0, 0.0) - jnp.where(i >> 1 == j >> 1, lower, 0.0)
    for bits in range(1, CHUNK.bit_length() - 1):  # blocks of 2**bits are inverted
        joins = (i >> bits != j >> bits) & (i >> (bits + 1) == j >> (bits + 1))
        room[2], room[3] = tc.split(inverse)
        plgpu.commit_smem()
        below = tc.product(*tc.three_pass(inverse, room.at[0], room.at[1]), room=simulated)
        below = jnp.where(joins, below, 0.0)
        inverse = inverse - tc.product(*tc.three_pass(below, room.at[2], room.at[3]), room=simulated)
    return inverse


def _kernel(*refs: Any, call: Call, save: bool) -> None:
    q_ref, k_ref, rows_ref, *rest = refs
    out, (q, k, rows, room, loaded, simulated) = (
        Matrices(rest[0], rest[1], rest[2], rest[3] if save else None),
        rest[-6:],
    )
    n, h, b = (lax.axis_index(name) for name in ("n", "h", "b"))
    first, key_head = n * CHUNK, lax.div(h, call.group)
    for ref, tile in ((q_ref, q), (k_ref, k)):
        for at in range(call.key_tiles):
            part = pl.ds(key_head * call.key_dim + at * tc.TILE, tc.TILE)
            plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(first, CHUNK), part], tile.at[at], loaded)
    plgpu.copy_gmem_to_smem(rows_ref.at[b, h, n], rows, loaded)
    plgpu.barrier_wait(loaded)
    keys = [(k.at[at], tc.transposed(k.at[at])) for at in range(call.key_tiles)]
    queries = [(q.at[at], tc.transposed(k.at[at])) for at in range(call.key_tiles)]
    similar, asked = (tc.product(*pairs, room=simulated) for pairs in (keys, queries))

    i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=tc.LAYOUT) for axis in (0, 1))
    by_i = [tc.by_row(tc.along_rows(rows.at[at])) for at in range(ROWS)]
    by_j = [tc.by_column(tc.along_columns(rows.at[at])) for at in range(ROWS)]
    seen = (j <= i) & (by_i[2] == by_j[2])
    difference = (by_i[0] - by_j[0]) + (by_i[1] - by_j[1])
    decay = jnp.where(seen, jnp.exp(jnp.where(seen, difference, 0.0)), 0.0)
    decay = decay * by_j[4]
    lower = jnp.where(j < i, similar * decay * (by_i[3] * by_i[4]), 0.0)
    attend = (asked * decay * by_i[5]).astype(jnp.bfloat16)
    inverse = unit_lower_inverse(lower, room, simulated)

    results = [(attend, out.attend), *zip(tc.split(inverse * by_j[3]), out[:2], strict=True)]
    if save:
        results.append((inverse.astype(jnp.bfloat16), out.inverse))
    for at, (tile, _) in enumerate(results):
        room[at] = tile
    plgpu.commit_smem()
    for at, (_, ref) in enumerate(results):
        plgpu.copy_smem_to_gmem(room.at[at], ref.at[b, h, n])
    plgpu.wait_smem_to_gmem(0)


def run(call: Call, q: jax.Array, k: jax.Array, rows: jax.Array, save: bool) -> Matrices:
    """`rows` is [B, H, n, ROWS, c]."""
    made = tc.launch(
        "delta_rule_matrices",
        functools.partial(_kernel, call=call, save=save),
        out_type=[call.pairs()] * (4 if save else 3),
        scratch_types=[
            tc.tiles(call.key_tiles),
            tc.tiles(call.key_tiles),
            plgpu.SMEM((ROWS, CHUNK), jnp.float32),
            tc.tiles(4),
            plgpu.Barrier(num_arrivals=2 * call.key_tiles + 1),
            tc.tiles() if call.simulated else None,
        ],
        grid={"n": call.chunks, "h": call.heads, "b": call.batch},
        interpret=call.interpret,
    )(q, k, rows)
    return Matrices(made[0], made[1], made[2], made[3] if save else None)
