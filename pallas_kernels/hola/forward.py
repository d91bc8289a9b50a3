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
from pallas_kernels.delta_rule.chunk import answer, norms, outgoing
from pallas_kernels.hola.layout import (
    Call,
    Counts,
    Operands,
    Part,
    Places,
    Prepared,
    cost,
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
    cache: Rows
    prepared: Prepared
    answer: Any  # [C, V] float32: of the state


def _through_state(given: Operands, on_chip: OnChip, call: Call) -> None:
    """Answers of the state and scores of a block, and the state behind it."""
    state, scores = on_chip.state[...], on_chip.prepared.scores
    for index, chunk in enumerate([load_chunk(given, call, index) for index in range(call.chunks)]):
        rows = call.rows_of(index)
        on_chip.answer[rows, :], write = answer(chunk, state)
        if given.scores is None:
            score = norms(write)
            if call.residual:
                beta = given.gates[index, 0:1, :]
                score = score / jnp.where(beta > 0, beta, 1.0)
            scores[:, rows] = score
        state = outgoing(chunk, state, write)
    on_chip.state[...] = state
    if given.scores is not None:
        scores[...] = given.scores[...]


def _read_and_merge(counts: Counts, given: Operands, tokens: Tokens, results: Results, on_chip: OnChip) -> None:
    b, h, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    before, after = counts.documents[b, i], counts.documents[b, i + 1]
    saved = None if results.kept is None else results.kept.cache
    if saved is not None:
        keep(on_chip.cache, saved)
    total = None if saved is None else saved.log_total
    for tile, read in read_tiles(tokens, on_chip.cache, given.sink[h], before, total):
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
        on_chip.state[...] = given.initial[...]
        for mine, theirs in zip(on_chip.cache, given.cache, strict=True):
            mine[...] = theirs[...]

    if results.kept is not None:
        results.kept.state[...] = on_chip.state[...]
    _through_state(given, on_chip, call)
    tokens = prepare(given, on_chip.prepared, call, i == 0, counts.fill[b])
    if given.running is not None:

        @pl.when(i == 0)
        def _() -> None:
            scores, held = on_chip.prepared.scores, occupied(call, counts.fill[b], axis=1)
            scores[...] = jnp.where(held, given.running.scores[...], scores[...])

    results.scores[...] = on_chip.prepared.scores[...]
    _read_and_merge(counts, given, tokens, results, on_chip)

    @pl.when(i == call.blocks - 1)
    def _() -> None:
        results.state[...] = on_chip.state[...]
        for theirs, mine in zip(results.cache, on_chip.cache, strict=True):
            theirs[...] = mine[...]


def prepared_scratch(call: Call, running: bool) -> Prepared:
    keys, values = (call.block, call.key_dim), (call.block, call.value_dim)
    return Prepared(
        pltpu.VMEM(keys, call.dtype),
        pltpu.VMEM(keys, call.dtype),
        pltpu.VMEM(values, call.dtype) if running else None,
        pltpu.VMEM((1, call.block), jnp.float32),
    )


def kept_specs(places: Places) -> Kept:
    call = places.call
    rows = (places.of_block(*size) for size in row_sizes(call))
    return Kept(places.of_block(call.key_dim, call.value_dim), Saved(places.token_row(), *rows))


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
        kept = Kept(before, Saved(log_total, *rows))
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
    prepared = prepared_scratch(call, given.running is not None)
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
                OnChip(pltpu.VMEM(state, jnp.float32), rows, prepared, pltpu.VMEM(values, jnp.float32)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(call, 3, 2, 2, (given, shapes)),
        interpret=call.interpret,
        name="hola_forward",
    )(*counts, given)[0]
