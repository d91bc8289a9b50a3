"""The fifth kernel: what the walks leave to do, all chunks at once, a block of threads for each 64 columns of K.

Blocks of one chunk each make the [c, c] gradients anew, and of what is summed over K the part of their columns.
"""

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
from pallas_kernels.delta_rule.gpu.shapes import Call, Gates, from_chunks, to_chunks

ROWS = 8  # coarse, fine, document, beta, key factor, query factor, entering, leaving
SUMS = 7  # see `Results`


class Given(NamedTuple):
    q: Any  # [B, T, h * K]
    k: Any
    writes: Any  # [B, T, H * V]
    d_out: Any
    d_rest: Any
    before: Any  # [B, H, n, V, K]
    d_after: Any
    rows: Any  # [B, H, n, ROWS, c]


class Results(NamedTuple):
    d_q: Any  # [B, T, H * K] float32, the factors that normalise held
    d_k: Any
    sums: Any  # [B, H, n, K / 64, SUMS, c]


class Gradients(NamedTuple):
    q: jax.Array  # [B, T, h * K] float32, the factors that normalise held
    k: jax.Array
    v: jax.Array  # [B, T, H * V]
    gates: Gates


def _kernel(*refs: Any, call: Call) -> None:
    given, results, room = Given(*refs[:8]), Results(*refs[8:11]), refs[11:]
    q, k, values, states, rows, pairs, out, sums, loaded = room
    place, n, h, b = (lax.axis_index(name) for name in ("tile", "n", "h", "b"))
    tokens, key_head = pl.ds(n * CHUNK, CHUNK), lax.div(h, call.group)
    for ref, own in ((given.q, q), (given.k, k)):
        part = pl.ds(key_head * call.key_dim + place * tc.TILE, tc.TILE)
        plgpu.copy_gmem_to_smem(ref.at[b, tokens, part], own, loaded)
    keys, wide = pl.ds(place * tc.TILE, tc.TILE), range(call.value_tiles)
    for at in wide:
        part = pl.ds(h * call.value_dim + at * tc.TILE, tc.TILE)
        for index, ref in enumerate((given.d_out, given.d_rest, given.writes)):
            plgpu.copy_gmem_to_smem(ref.at[b, tokens, part], values.at[index, at], loaded)
        for index, ref in enumerate((given.before, given.d_after)):
            part = pl.ds(at * tc.TILE, tc.TILE)
            plgpu.copy_gmem_to_smem(ref.at[b, h, n, part, keys], states.at[index, at], loaded)
    plgpu.copy_gmem_to_smem(given.rows.at[b, h, n], rows, loaded)
    plgpu.barrier_wait(loaded)

    def row(at: int) -> jax.Array:
        return tc.by_row(tc.along_rows(rows.at[at]))

    def column(at: int) -> jax.Array:
        return tc.by_column(tc.along_columns(rows.at[at]))

    def held(ref: Any) -> jax.Array:
        return plgpu.load(ref, layout=tc.LAYOUT).astype(jnp.float32)

    def total(at: int, tile: jax.Array, axis: int) -> None:
        sums[at, :] = jnp.sum(tile, axis=axis)

    def send(tile: jax.Array, ref: Any) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out[...] = tile
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, ref.at[b, tokens, pl.ds(h * call.key_dim + place * tc.TILE, tc.TILE)])

    multiply = functools.partial(tc.product, room=None)
    i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=tc.LAYOUT) for axis in (0, 1))
    seen = (j <= i) & (row(2) == column(2))
    difference = (row(0) - column(0)) + (row(1) - column(1))
    decay = jnp.where(seen, jnp.exp(jnp.where(seen, difference, 0.0)), 0.0) * column(4)
    attend = multiply(*((values.at[0, at], tc.transposed(values.at[2, at])) for at in wide)) * decay * row(5)
    pairs[0] = attend.astype(jnp.bfloat16)
    between = attend * multiply((q, tc.transposed(k)))
    lower = multiply(*((values.at[1, at], tc.transposed(values.at[2, at])) for at in wide))
    lower = jnp.where(j < i, -lower * decay * row(4), 0.0)
    pairs[1] = (lower * row(3)).astype(jnp.bfloat16)
    plgpu.commit_smem()
    lower = lower * multiply((k, tc.transposed(k)))
    total(3, lower, 1)
    between = between + lower * row(3)
    total(4, between, 1)
    total(5, between, 0)

    reads = multiply(*((values.at[0, at], states.at[0, at]) for at in wide))
    total(0, reads * held(q), 1)
    send(reads * (row(5) * row(6)) + multiply((pairs.at[0], k)), results.d_q)
    predicts = multiply(*((values.at[1, at], states.at[0, at]) for at in wide))
    total(1, predicts * held(k), 1)
    leaves = multiply(*((values.at[2, at], states.at[1, at]) for at in wide))
    total(2, leaves * held(k), 1)
    d_k = leaves * (row(4) * row(7)) - predicts * (row(3) * row(4) * row(6))
    through = [(tc.transposed(pairs.at[0]), q), (pairs.at[1], k), (tc.transposed(pairs.at[1]), k)]
    send(d_k + multiply(*through), results.d_k)
    total(6, sum((held(states.at[0, at]) * held(states.at[1, at]) for at in wide), tc.zeros()), 1)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(sums, results.sums.at[b, h, n, place])
    plgpu.wait_smem_to_gmem(0)


def _over_group(call: Call, x: jax.Array) -> jax.Array:
    """[B, T, H * K] summed over the value heads of each key head."""
    x = x.reshape(call.batch, call.length, call.key_heads, call.group, call.key_dim).sum(axis=3)
    return x.reshape(call.batch, call.length, -1)


def run(
    call: Call,
    tokens: tuple[jax.Array, ...],
    states: tuple[jax.Array, jax.Array],
    gate: Gates,
    queries: jax.Array,
    keys: jax.Array,
) -> Gradients:
    """`tokens` are q, k, v, the residuals and the gradients of outputs and of what is solved for; `states` S before and
    its gradient behind each chunk; `queries` and `keys` [B, H, n, c] the factors of raw queries and keys."""
    q, k, v, writes, d_out, d_rest = tokens
    document = jnp.broadcast_to(gate.document[:, None], keys.shape)
    rows = [gate.coarse, gate.fine, document, gate.beta, keys, queries, gate.entering, gate.leaving]
    wide = jax.ShapeDtypeStruct((call.batch, call.length, call.heads * call.key_dim), jnp.float32)
    d_q, d_k, sums = tc.launch(
        "delta_rule_gradients",
        functools.partial(_kernel, call=call),
        out_type=[wide, wide, call.rows(call.key_tiles, SUMS)],
        scratch_types=[
            tc.tiles(),
            tc.tiles(),
            tc.tiles(3, call.value_tiles),
            tc.tiles(2, call.value_tiles),
            plgpu.SMEM((ROWS, CHUNK), jnp.float32),
            tc.tiles(2),
            tc.sums(),
            plgpu.SMEM((SUMS, CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=5 * call.value_tiles + 3),
        ],
        grid={"tile": call.key_tiles, "n": call.chunks, "h": call.heads, "b": call.batch},
        interpret=call.interpret,
    )(q, k, writes, d_out, d_rest, *states, jnp.stack(rows, axis=3))
    asked, predicted, left, pairs, by_i, by_j, kept = (jnp.sum(sums, axis=3)[:, :, :, at] for at in range(SUMS))
    shape = (call.batch, call.length, call.heads, call.value_dim)
    d_rest = d_rest.astype(jnp.float32).reshape(shape)
    beta = from_chunks(gate.beta, call.length)[..., None]
    found = Gates(
        beta=to_chunks(jnp.sum(d_rest * v.reshape(shape), axis=-1), 0) - keys * gate.entering * predicted + pairs,
        coarse=jnp.zeros_like(gate.coarse),
        fine=by_i - by_j,
        entering=queries * asked - gate.beta * keys * predicted,
        leaving=keys * left,
        keep=jnp.sum(kept, axis=-1),
        document=jnp.zeros_like(gate.document),
    )
    d_v = (d_rest * beta).reshape(call.batch, call.length, -1)
    return Gradients(_over_group(call, d_q), _over_group(call, d_k), d_v, found)


def through_norm(call: Call, raw: jax.Array, gradient: jax.Array, norms: jax.Array) -> jax.Array:
    """The gradient by keys or queries, from the one that holds the factors [B, T, h, 1] that normalise them."""
    shape = (call.batch, call.length, call.key_heads, call.key_dim)
    raw, gradient = (x.astype(jnp.float32).reshape(shape) for x in (raw, gradient))
    if call.normalise:
        gradient = gradient - raw * (lax.square(norms) * jnp.sum(raw * gradient, axis=-1, keepdims=True))
    return gradient.reshape(call.batch, call.length, -1)
