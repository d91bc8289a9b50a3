"""The read: a thread block takes 128 queries of one block of tokens, 64 to a warpgroup, and walks over what they see.

A third warpgroup copies the tiles of keys and values while the two multiply. The softmax runs along: its weights go
through shared memory into the second product, the sums stay in registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.cache.gpu.places import Entries, Operands, Place, Sizes, launch
from pallas_kernels.cache.gpu.tiles import (
    BY_COLUMN,
    BY_ROW,
    COPYING,
    LOG2E,
    MULTIPLYING,
    ROWS,
    add_product,
    bfloat16,
    by_column,
    by_row,
    flipped,
    float32,
    index,
    loop,
    matrix,
    product,
    turn,
    unmoved,
    zeros,
)

STAGES = 2
LEAST, TINY = -1e30, 1e-30  # of maximum and sum: a query that sees nothing, without a sink, reads 0 and no NaN


class Scratch(NamedTuple):
    """Of each warpgroup that multiplies, beside the entries."""

    entries: Entries
    own: Any  # queries, then what they read
    weights: Any
    asking: Any
    log_total: Any
    ready: Any


def _kernel(
    sizes: Sizes, interpret: bool, operands: Operands, sink: Any, out: Any, log_total: Any, scratch: Scratch
) -> None:
    entries, wg, place = scratch.entries, lax.axis_index("wg"), Place.of_queries(sizes)
    first = place.part * (ROWS * sizes.readers)
    steps = (sizes.window + first) // ROWS + sizes.readers

    @pl.when(wg == sizes.readers)
    def _() -> None:
        if sizes.readers > 1:
            plgpu.set_max_registers(COPYING, action="decrease")
        entries.bring(operands, place, steps)

    @pl.when(wg < sizes.readers)
    def _() -> None:
        if sizes.readers > 1:
            plgpu.set_max_registers(MULTIPLYING, action="increase")
        _read(interpret, operands, sink, out, log_total, scratch, place, first, steps)


def _read(
    interpret: bool,
    operands: Operands,
    sink: Any,
    out: Any,
    log_total: Any,
    scratch: Scratch,
    place: Place,
    first: Any,
    steps: Any,
) -> None:
    sizes, entries, wg = place.sizes, scratch.entries, lax.axis_index("wg")
    within = first + wg * ROWS
    last = (sizes.window + within) // ROWS
    queries, read = (scratch.own.at[wg, :, pl.ds(0, width)] for width in (sizes.key_dim, sizes.value_dim))
    plgpu.copy_gmem_to_smem(operands.queries.at[place.tokens(within)], queries, scratch.ready.at[wg])
    plgpu.copy_gmem_to_smem(operands.asking.at[place.of_all(within)], scratch.asking.at[wg], scratch.ready.at[wg])
    plgpu.barrier_wait(scratch.ready.at[wg])
    asking = by_row(plgpu.load(scratch.asking.at[wg], layout=BY_ROW))
    none = sink[place.head] * LOG2E
    top = plgpu.layout_cast(jnp.full((ROWS,), jnp.maximum(none, LEAST)), BY_ROW)

    def step(i: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, sums = carry
        slot, mine = turn(i, entries.stages), unmoved(wg, i)
        plgpu.barrier_wait(entries.keys.ready.at[slot])
        mine_now = scratch.own.at[mine, :, pl.ds(0, sizes.key_dim)]
        logits = product(mine_now, flipped(entries.keys.buffers.at[slot])) * LOG2E
        visible = asking == by_column(plgpu.load(entries.owners.at[slot], layout=BY_COLUMN))
        visible &= index(1) <= index(0) + jnp.where(i == last, 0, ROWS)
        plgpu.barrier_arrive(entries.keys.consumed.at[slot])
        logits = jnp.where(visible, logits, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(logits, axis=1))
        fades, weights = jnp.exp2(top - higher), jnp.exp2(logits - by_row(higher))
        total = total * fades + jnp.sum(weights, axis=1)
        scratch.weights[mine] = weights.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_wait(entries.values.ready.at[slot])
        sums = sums * lax.broadcast_in_dim(fades, sums.shape, [0])
        sums = add_product(sums, scratch.weights.at[mine], entries.values.buffers.at[slot], interpret)
        plgpu.barrier_arrive(entries.values.consumed.at[slot])
        return higher, total, sums

    carry = top, jnp.exp2(none - top), zeros(ROWS, sizes.value_dim)
    top, total, sums = lax.fori_loop(0, last + 1, step, carry)
    loop(last + 1, steps, entries.pass_by)
    total = jnp.maximum(total, TINY)
    read[...] = (sums / lax.broadcast_in_dim(total, sums.shape, [0])).astype(jnp.bfloat16)
    scratch.log_total[wg] = top + jnp.log2(total)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(read, out.at[place.tokens(within)])
    plgpu.copy_smem_to_gmem(scratch.log_total.at[wg], log_total.at[place.of_head(within)])
    plgpu.wait_smem_to_gmem(0)


def forward(sizes: Sizes, operands: Operands, sink: Array, interpret: Any) -> tuple[Array, Array]:
    """What is read [B, T, H, V] in bfloat16, and the logarithm to base 2 of each softmax's sum [B H T]."""
    wgs = sizes.readers
    scratch = Scratch(
        Entries.scratch(sizes, STAGES),
        matrix(wgs, ROWS, max(sizes.key_dim, sizes.value_dim)),
        matrix(wgs, ROWS, ROWS),
        plgpu.SMEM((wgs, ROWS), jnp.int32),
        plgpu.SMEM((wgs, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=2, num_barriers=wgs),
    )

    def hola_cache_forward(*refs: Any) -> None:
        *given, sink, out, log_total, scratch = refs
        _kernel(sizes, bool(interpret), Operands(*given), sink, out, log_total, scratch)

    result = (
        bfloat16(sizes.batch, sizes.tokens, sizes.heads, sizes.value_dim),
        float32(sizes.batch * sizes.heads * sizes.tokens),
    )
    grid = sizes.heads, sizes.tokens // (ROWS * wgs), sizes.batch
    return launch(hola_cache_forward, result, (scratch,), grid, wgs + 1, interpret)(*operands, sink)
