"""The third kernel: the outputs of every chunk from the state before it and its writes, all chunks at once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.delta_rule.chunk import CHUNK
from pallas_kernels.delta_rule.gpu import tensor_core as tc
from pallas_kernels.delta_rule.gpu.shapes import Call


def _kernel(
    q_ref: Any, before_ref: Any, writes_ref: Any, attend_ref: Any, factor_ref: Any, out_ref: Any, *room: Any, call: Call
) -> None:
    q, before, write, attend, factor, out, loaded = room
    tile, n, h, b = (lax.axis_index(name) for name in ("tile", "n", "h", "b"))
    tokens, key_head = pl.ds(n * CHUNK, CHUNK), lax.div(h, call.group)
    columns, part = pl.ds(tile * tc.TILE, tc.TILE), pl.ds(h * call.value_dim + tile * tc.TILE, tc.TILE)
    for at in range(call.key_tiles):
        keys, own = pl.ds(at * tc.TILE, tc.TILE), pl.ds(key_head * call.key_dim + at * tc.TILE, tc.TILE)
        plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, own], q.at[at], loaded)
        plgpu.copy_gmem_to_smem(before_ref.at[b, h, n, columns, keys], before.at[at], loaded)
    plgpu.copy_gmem_to_smem(writes_ref.at[b, tokens, part], write, loaded)
    plgpu.copy_gmem_to_smem(attend_ref.at[b, h, n], attend, loaded)
    plgpu.copy_gmem_to_smem(factor_ref.at[b, h, n], factor, loaded)
    plgpu.barrier_wait(loaded)
    pairs = [(q.at[at], tc.transposed(before.at[at])) for at in range(call.key_tiles)]
    seen = tc.product(*pairs, room=None) * tc.by_row(tc.along_rows(factor))
    out[...] = (seen + tc.product((attend, write), room=None)).astype(call.out_dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, out_ref.at[b, tokens, part])
    plgpu.wait_smem_to_gmem(0)


def run(call: Call, q: Any, before: Any, writes: Any, attend: Any, factor: Any) -> jax.Array:
    """`factor` [B, H, n, c] is what a query is multiplied with to read the incoming state."""
    return tc.launch(
        "delta_rule_outputs",
        functools.partial(_kernel, call=call),
        out_type=call.values(call.out_dtype),
        scratch_types=[
            tc.tiles(call.key_tiles),
            tc.tiles(call.key_tiles),
            tc.tiles(),
            tc.tiles(),
            plgpu.SMEM((CHUNK,), jnp.float32),
            tc.tiles() if call.out_dtype == "bfloat16" else tc.sums(),
            plgpu.Barrier(num_arrivals=2 * call.key_tiles + 3),
        ],
        grid={"tile": call.value_tiles, "n": call.chunks, "h": call.heads, "b": call.batch},
        interpret=call.interpret,
    )(q, before, writes, attend, factor)
