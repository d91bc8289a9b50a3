"""The forward kernel: each block goes through the state chunk by chunk, reads the cache, and competes for it.

S and the cache stay on the chip from a head's first block to its last, and what the state answers waits there for what the
cache does: q, k, v and the gates are read once, outputs written once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cache.arrays import Rows, Tokens
from pallas_kernels.cache.forward import Saved, keep, merge, read_tiles
from pallas_kernels.delta_rule.chunk import (
    SPOILT,
    answer,
    mark_behind,
    marked,
    norms,
    outgoing,
    spoilt,
    to_row,
    without_spoilt,
)
from pallas_kernels.hola.layout import (
    Call,
    Counts,
    Operands,
    Part,
    Places,
    Prepared,
    cost,
    documents_of,
    for_runs,
    load_chunk,
    occupied,
    prepare,
    row_sizes,
    row_types,
)


class Kept(NamedTuple):
    """What the backward pass is left with, beside the operands; all else is made again."""

    state: Part  # [B, H, n, K, V] float32: before each block
    cache: Saved  # before each block, and the softmax's sums
    marks: Part  # [B, H, T / c, 1, c] float32: which outputs are NaN, whatever they were made of


class Results(NamedTuple):
    """What the forward kernel writes."""

    out: Part  # [B, T, H * V]
    scores: Part  # [B, H, 1, T] float32
    state: Part  # [B, H, K, V] float32: after the last token
    cache: Rows  # [B, H, ...]: after the last whole block
    kept: Kept | None


class OnChip(NamedTuple):
    """What lives on the chip along the blocks of a head, and along one block."""

    state: Any  # [K, V] float32
    mark: Any  # [1, 1] float32: whether the state is spoilt
    cache: Rows
    prepared: Prepared
    answer: Any  # [C, V] float32: of the state; NaN where the output is to be
    norms: Any  # [m, 1, c] float32: of the writes


def _through_state(given: Operands, kept: Kept | None, on_chip: OnChip, call: Call) -> None:
    """Answers of the state and scores of a block, and the state behind it."""

    def run(indices: list[Any]) -> None:
        state, mark = on_chip.state[...], on_chip.mark[...]
        for index, chunk in zip(indices, [load_chunk(given, call, i) for i in indices], strict=True):
            documents, (out, write) = documents_of(given, index), answer(chunk, state)
            marks = spoilt(chunk, documents, mark)
            on_chip.answer[call.rows_of(index), :] = marked(out, marks, documents)
            if kept is not None:
                kept.marks[index] = to_row(marks)
            score = norms(write)
            if call.residual:
                beta = given.gates[index, 0:1, :]
                score = score / jnp.where(beta > 0, beta, 1.0)
            on_chip.norms[index] = score
            state, mark = outgoing(chunk, state, write), mark_behind(marks)
        on_chip.state[...], on_chip.mark[...] = state, mark

    for_runs(call, run)
    scores = on_chip.prepared.scores
    if given.scores is not None:
        scores[...] = given.scores[...]
    else:
        for index, tokens in enumerate(call.chunk_slices):
            scores[:, tokens] = on_chip.norms[index]


def _read_and_merge(
    counts: Counts, given: Operands, tokens: Tokens, results: Results, on_chip: OnChip, call: Call
) -> None:
    b, h, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    before, after = counts.documents[b, i], counts.documents[b, i + 1]
    saved = None if results.kept is None else results.kept.cache
    if saved is not None:
        keep(on_chip.cache, saved)
    total = None if saved is None else saved.log_total
    for tile, read in read_tiles(tokens, on_chip.cache, given.sink[h], before, total, call.energy):
        results.out[tile, :] = (on_chip.answer[tile, :] + given.gate[h] * read).astype(results.out.dtype)

    @pl.when(i < counts.whole[b])
    def _() -> None:
        first = counts.start[b] + i * tokens.keys.shape[0]
        merge(tokens, on_chip.cache, before, after, first, None if saved is None else saved.source)


def _kernel(*refs: Any, call: Call) -> None:
    counts, (given, results, on_chip) = Counts(*refs[:4]), refs[4:]
    b, i = pl.program_id(0), pl.program_id(2)

    @pl.when(i == 0)
    def _() -> None:
        on_chip.state[...], on_chip.mark[...] = without_spoilt(given.initial[...])
        for mine, theirs in zip(on_chip.cache, given.cache, strict=True):
            mine[...] = theirs[...]

    if results.kept is not None:
        results.kept.state[...] = on_chip.state[...]
    _through_state(given, results.kept, on_chip, call)
    tokens = prepare(given, on_chip.prepared, call, i == 0, counts.fill[b])
    if given.running is not None:

        @pl.when(i == 0)
        def _() -> None:
            scores, held = on_chip.prepared.scores, occupied(call, counts.fill[b], axis=1)
            scores[...] = jnp.where(held, given.running.scores[...], scores[...])

    results.scores[...] = on_chip.prepared.scores[...]
    _read_and_merge(counts, given, tokens, results, on_chip, call)

    @pl.when(i == call.blocks - 1)
    def _() -> None:
        results.state[...] = jnp.where(on_chip.mark[...] == SPOILT, jnp.nan, on_chip.state[...])
        for theirs, mine in zip(results.cache, on_chip.cache, strict=True):
            theirs[...] = mine[...]


def prepared_scratch(call: Call) -> Prepared:
    keys, values = (call.block, call.key_dim), (call.block, call.value_dim)
    return Prepared(
        pltpu.VMEM(keys, call.dtype),
        pltpu.VMEM(keys, call.dtype),
        pltpu.VMEM(values, call.dtype),
        pltpu.VMEM((1, call.block), jnp.float32),
    )


def kept_specs(places: Places) -> Kept:
    call = places.call
    rows = (places.of_block(*size) for size in row_sizes(call))
    state = places.of_block(call.key_dim, call.value_dim)
    return Kept(state, Saved(places.token_row(), *rows), places.chunk_rows(1))


def _shapes(call: Call, save: bool) -> Results:
    per_token, state = (*call.per_head, 1, call.length), (call.key_dim, call.value_dim)
    sizes, types = row_sizes(call), row_types(call)
    kept = None
    if save:
        rows = (
            jax.ShapeDtypeStruct((*call.per_head, call.blocks, *size), dtype)
            for size, dtype in zip(sizes, types, strict=True)
        )
        log_total = jax.ShapeDtypeStruct(per_token, jnp.float32)
        before = jax.ShapeDtypeStruct((*call.per_head, call.blocks, *state), jnp.float32)
        marks = jax.ShapeDtypeStruct((*call.per_head, call.blocks * call.chunks, 1, call.chunk), jnp.float32)
        kept = Kept(before, Saved(log_total, *rows), marks)
    return Results(
        jax.ShapeDtypeStruct((call.batch, call.length, call.heads * call.value_dim), call.dtype),
        jax.ShapeDtypeStruct(per_token, jnp.float32),
        jax.ShapeDtypeStruct((*call.per_head, *state), jnp.float32),
        Rows(*(jax.ShapeDtypeStruct((*call.per_head, *size), dtype) for size, dtype in zip(sizes, types, strict=True))),
        kept,
    )


def run(call: Call, counts: Counts, given: Operands, save: bool) -> Results:
    """All blocks of all heads; `save` keeps what the backward pass needs."""
    places, shapes = Places(call), _shapes(call, save)
    state, values = (call.key_dim, call.value_dim), (call.block, call.value_dim)
    rows = Rows(*(pltpu.VMEM(*x) for x in zip(row_sizes(call), row_types(call), strict=True)))
    return pl.pallas_call(
        functools.partial(_kernel, call=call),
        out_shape=(shapes,),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(call.batch, call.heads, call.blocks),
            in_specs=[places.operands(given)],
            out_specs=(
                Results(
                    places.tokens(call.value_dim),
                    places.token_row(),
                    places.of_head(*state),
                    places.rows(),
                    kept_specs(places) if save else None,
                ),
            ),
            scratch_shapes=[
                OnChip(
                    pltpu.VMEM(state, jnp.float32),
                    pltpu.VMEM((1, 1), jnp.float32),
                    rows,
                    prepared_scratch(call),
                    pltpu.VMEM(values, jnp.float32),
                    pltpu.VMEM((call.chunks, 1, call.chunk), jnp.float32),
                ),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(call, 3, 2, 2, (given, shapes)),
        interpret=call.interpret,
        name="hola_forward",
    )(*counts, given)[0]
