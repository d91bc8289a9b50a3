"""The gradient of the read, in two kernels: by the queries, and by the entries that they see.

Both compute the softmax's weights again from the logarithms of its sums. What an entry gets comes from the queries of one
block only, so nothing is added in an order that could vary; what a token gets as a row of later caches is added up
outside (see `choice`).
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
    index,
    loop,
    matrix,
    product,
    turn,
    unmoved,
    zeros,
)


class Known(NamedTuple):
    """Of each query."""

    d_out: Any  # [B, T, H, V], bfloat16
    log_total: Any  # [B H T]: to base 2, of the softmax's sum
    spent: Any  # [B H T]: d_out . out, the mean of the gradient by the weights


class QueriesScratch(NamedTuple):
    """Of each warpgroup that multiplies, beside the entries."""

    entries: Entries
    queries: Any  # then their gradient
    d_out: Any
    d_logits: Any
    asking: Any
    log_total: Any
    spent: Any
    ready: Any


def _queries_kernel(
    sizes: Sizes, interpret: bool, operands: Operands, known: Known, d_queries: Any, scratch: QueriesScratch
) -> None:
    """As the forward kernel."""
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
        within = first + wg * ROWS
        sums = _by_queries(interpret, operands, known, scratch, place, within)
        loop((sizes.window + within) // ROWS + 1, steps, entries.pass_by)
        scratch.queries[wg] = sums.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.queries.at[wg], d_queries.at[place.tokens(within)])
        plgpu.wait_smem_to_gmem(0)


def _by_queries(
    interpret: bool, operands: Operands, known: Known, scratch: QueriesScratch, place: Place, within: Any
) -> Array:
    """[ROWS, K]. Values are met first: while they are multiplied, the keys, which have one buffer at K = V = 256, come."""
    entries, wg = scratch.entries, lax.axis_index("wg")
    last = (place.sizes.window + within) // ROWS
    for source, target in (
        (operands.queries.at[place.tokens(within)], scratch.queries),
        (known.d_out.at[place.tokens(within)], scratch.d_out),
        (operands.asking.at[place.of_all(within)], scratch.asking),
        (known.log_total.at[place.of_head(within)], scratch.log_total),
        (known.spent.at[place.of_head(within)], scratch.spent),
    ):
        plgpu.copy_gmem_to_smem(source, target.at[wg], scratch.ready.at[wg])
    plgpu.barrier_wait(scratch.ready.at[wg])
    of_queries = scratch.asking, scratch.log_total, scratch.spent
    asking, log_total, spent = (by_row(plgpu.load(x.at[wg], layout=BY_ROW)) for x in of_queries)

    def step(i: Any, sums: Array) -> Array:
        slot, mine = turn(i, entries.stages), unmoved(wg, i)
        plgpu.barrier_wait(entries.values.ready.at[slot])
        d_weights = product(scratch.d_out.at[mine], flipped(entries.values.buffers.at[slot])) - spent
        d_weights = d_weights.astype(jnp.bfloat16)  # half the registers, until it is multiplied by the weights
        plgpu.barrier_arrive(entries.values.consumed.at[slot])
        plgpu.barrier_wait(entries.keys.ready.at[slot])
        logits = product(scratch.queries.at[mine], flipped(entries.keys.buffers.at[slot])) * LOG2E
        visible = asking == by_column(plgpu.load(entries.owners.at[slot], layout=BY_COLUMN))
        visible &= index(1) <= index(0) + jnp.where(i == last, 0, ROWS)
        weights = jnp.exp2(jnp.where(visible, logits, -jnp.inf) - log_total)
        scratch.d_logits[mine] = (weights * d_weights.astype(jnp.float32)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        sums = add_product(sums, scratch.d_logits.at[mine], entries.keys.buffers.at[slot], interpret)
        plgpu.barrier_arrive(entries.keys.consumed.at[slot])
        return sums

    return lax.fori_loop(0, last + 1, step, zeros(ROWS, place.sizes.key_dim))


def by_queries(sizes: Sizes, operands: Operands, known: Known, interpret: Any) -> Array:
    """The gradient by the queries [B, T, H, K]."""
    wgs = sizes.readers
    scratch = QueriesScratch(
        Entries.scratch(sizes, 2 if sizes.key_dim + sizes.value_dim <= 256 else 1),
        matrix(wgs, ROWS, sizes.key_dim),
        matrix(wgs, ROWS, sizes.value_dim),
        matrix(wgs, ROWS, ROWS),
        plgpu.SMEM((wgs, ROWS), jnp.int32),
        plgpu.SMEM((wgs, ROWS), jnp.float32),
        plgpu.SMEM((wgs, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=5, num_barriers=wgs),
    )

    def hola_cache_by_queries(*refs: Any) -> None:
        *given, d_out, log_total, spent, d_queries, scratch = refs
        known = Known(d_out, log_total, spent)
        _queries_kernel(sizes, bool(interpret), Operands(*given), known, d_queries, scratch)

    result = bfloat16(sizes.batch, sizes.tokens, sizes.heads, sizes.key_dim)
    grid = sizes.heads, sizes.tokens // (ROWS * wgs), sizes.batch
    return launch(hola_cache_by_queries, result, (scratch,), grid, wgs + 1, interpret)(*operands, *known)


class ByEntries(NamedTuple):
    """The gradient by what the queries see."""

    keys: Any  # [B, T, H, K]: for each value head
    values: Any  # [B, T, H, V]
    cached_keys: Any  # [B H n W, K]
    cached_values: Any  # [B H n W, V]


class EntriesScratch(NamedTuple):
    keys: Any  # of the entries, then their gradient
    values: Any
    owners: Any
    own_ready: Any
    queries: Any  # a ring of tiles of queries
    d_out: Any
    asking: Any
    log_total: Any
    spent: Any
    ready: Any
    consumed: Any
    weights: Any  # from the first warpgroup to the second
    weighed: Any
    taken: Any
    d_logits: Any


def _entries_kernel(
    sizes: Sizes, interpret: bool, operands: Operands, known: Known, result: ByEntries, scratch: EntriesScratch
) -> None:
    """64 entries and all queries of the block that may see them. The first warpgroup has the weights and the gradient by
    values, the second that by weights and by keys: each two of the four products, and 64 x 256 sums in its registers."""
    wg, place = lax.axis_index("wg"), Place.of_entries(sizes)
    part = place.part - sizes.window // ROWS  # negative in the cache
    skipped = jnp.maximum(part, 0)
    steps = sizes.block // ROWS - skipped
    rows, tokens = place.cached(place.part * ROWS), part * ROWS

    def give(sums: Array, staging: Any, of_tokens: Any, of_cache: Any) -> None:
        staging[...] = sums.astype(jnp.bfloat16)
        plgpu.commit_smem()

        @pl.when(part < 0)
        def _() -> None:
            plgpu.copy_smem_to_gmem(staging, of_cache.at[rows])

        @pl.when(part >= 0)
        def _() -> None:
            plgpu.copy_smem_to_gmem(staging, of_tokens.at[place.tokens(tokens)])

        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 0)
    def _() -> None:
        plgpu.set_max_registers(MULTIPLYING, action="increase")
        sums = _by_values(interpret, sizes, scratch, part, steps)
        give(sums, scratch.values.at[0], result.values, result.cached_values)

    @pl.when(wg == 1)
    def _() -> None:
        plgpu.set_max_registers(MULTIPLYING, action="increase")
        sums = _by_keys(interpret, sizes, scratch, steps)
        give(sums, scratch.keys.at[0], result.keys, result.cached_keys)

    @pl.when(wg == 2)
    def _() -> None:
        plgpu.set_max_registers(COPYING, action="decrease")

        @pl.when(part < 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(operands.cached_keys.at[rows], scratch.keys.at[0], scratch.own_ready)
            plgpu.copy_gmem_to_smem(operands.cached_values.at[rows], scratch.values.at[0], scratch.own_ready)
            plgpu.copy_gmem_to_smem(operands.cached_owners.at[rows], scratch.owners, scratch.own_ready)

        @pl.when(part >= 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(operands.keys.at[place.shared(tokens)], scratch.keys.at[0], scratch.own_ready)
            plgpu.copy_gmem_to_smem(operands.values.at[place.tokens(tokens)], scratch.values.at[0], scratch.own_ready)
            plgpu.copy_gmem_to_smem(operands.owners.at[place.of_all(tokens)], scratch.owners, scratch.own_ready)

        loop(0, steps, lambda step: _bring_queries(operands, known, scratch, place, step, skipped))


def _bring_queries(
    operands: Operands, known: Known, scratch: EntriesScratch, place: Place, step: Any, skipped: Any
) -> None:
    slot, within = turn(step, 2), (skipped + step) * ROWS

    @pl.when(step >= 2)
    def _() -> None:
        plgpu.barrier_wait(scratch.consumed.at[slot])

    for source, target in (
        (operands.queries.at[place.tokens(within)], scratch.queries),
        (known.d_out.at[place.tokens(within)], scratch.d_out),
        (operands.asking.at[place.of_all(within)], scratch.asking),
        (known.log_total.at[place.of_head(within)], scratch.log_total),
        (known.spent.at[place.of_head(within)], scratch.spent),
    ):
        plgpu.copy_gmem_to_smem(source, target.at[slot], scratch.ready.at[slot])


def _by_values(interpret: bool, sizes: Sizes, scratch: EntriesScratch, part: Any, steps: Any) -> Array:
    """[ROWS, V]; entries lie along rows, queries along columns."""
    plgpu.barrier_wait(scratch.own_ready)
    owners = by_row(plgpu.load(scratch.owners, layout=BY_ROW))

    def step(i: Any, sums: Array) -> Array:
        slot = turn(i, 2)
        plgpu.barrier_wait(scratch.ready.at[slot])
        logits = product(scratch.keys.at[unmoved(0, i)], flipped(scratch.queries.at[slot])) * LOG2E
        visible = owners == by_column(plgpu.load(scratch.asking.at[slot], layout=BY_COLUMN))
        visible &= index(0) <= index(1) + jnp.where((part >= 0) & (i == 0), 0, ROWS)
        log_total = by_column(plgpu.load(scratch.log_total.at[slot], layout=BY_COLUMN))
        weights = jnp.exp2(jnp.where(visible, logits, -jnp.inf) - log_total)

        @pl.when(i >= 2)
        def _() -> None:
            plgpu.barrier_wait(scratch.taken.at[slot])

        scratch.weights[slot] = weights.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.weighed.at[slot])
        sums = add_product(sums, scratch.weights.at[slot], scratch.d_out.at[slot], interpret)
        plgpu.barrier_arrive(scratch.consumed.at[slot])
        return sums

    sums = lax.fori_loop(0, steps, step, zeros(ROWS, sizes.value_dim))
    # The other warpgroup multiplies by the values until it takes the last weights; then they may be overwritten.
    loop(jnp.maximum(steps - 2, 0), steps, lambda i: plgpu.barrier_wait(scratch.taken.at[turn(i, 2)]))
    return sums


def _by_keys(interpret: bool, sizes: Sizes, scratch: EntriesScratch, steps: Any) -> Array:
    """[ROWS, K]. When the last weights came, the other warpgroup has no more use for the keys."""
    plgpu.barrier_wait(scratch.own_ready)

    def step(i: Any, sums: Array) -> Array:
        slot = turn(i, 2)
        plgpu.barrier_wait(scratch.ready.at[slot])
        d_weights = product(scratch.values.at[unmoved(0, i)], flipped(scratch.d_out.at[slot]))
        d_weights -= by_column(plgpu.load(scratch.spent.at[slot], layout=BY_COLUMN))
        plgpu.barrier_wait(scratch.weighed.at[slot])
        weights = plgpu.load(scratch.weights.at[slot], layout=plgpu.Layout.WGMMA)
        scratch.d_logits[...] = (weights.astype(jnp.float32) * d_weights).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.taken.at[slot])
        sums = add_product(sums, scratch.d_logits, scratch.queries.at[slot], interpret)
        plgpu.barrier_arrive(scratch.consumed.at[slot])
        return sums

    return lax.fori_loop(0, steps, step, zeros(ROWS, sizes.key_dim))


def by_entries(sizes: Sizes, operands: Operands, known: Known, interpret: Any) -> ByEntries:
    """The gradient by the keys and values of tokens and of the caches that blocks find."""
    scratch = EntriesScratch(
        matrix(1, ROWS, sizes.key_dim),
        matrix(1, ROWS, sizes.value_dim),
        plgpu.SMEM((ROWS,), jnp.int32),
        plgpu.Barrier(num_arrivals=3),
        matrix(2, ROWS, sizes.key_dim),
        matrix(2, ROWS, sizes.value_dim),
        plgpu.SMEM((2, ROWS), jnp.int32),
        plgpu.SMEM((2, ROWS), jnp.float32),
        plgpu.SMEM((2, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=5, num_barriers=2),
        plgpu.Barrier(num_arrivals=2, num_barriers=2),
        matrix(2, ROWS, ROWS),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=2),
        matrix(ROWS, ROWS),
    )

    def hola_cache_by_entries(*refs: Any) -> None:
        operands, known, result = Operands(*refs[:8]), Known(*refs[8:11]), ByEntries(*refs[11:15])
        _entries_kernel(sizes, bool(interpret), operands, known, result, refs[15])

    result = ByEntries(
        bfloat16(sizes.batch, sizes.tokens, sizes.heads, sizes.key_dim),
        bfloat16(sizes.batch, sizes.tokens, sizes.heads, sizes.value_dim),
        bfloat16(sizes.rows, sizes.key_dim),
        bfloat16(sizes.rows, sizes.value_dim),
    )
    grid = sizes.heads, sizes.blocks * (sizes.window + sizes.block) // ROWS, sizes.batch
    return ByEntries(*launch(hola_cache_by_entries, tuple(result), (scratch,), grid, 3, interpret)(*operands, *known))
