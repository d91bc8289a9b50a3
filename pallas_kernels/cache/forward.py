"""The forward kernel: each block reads [cache | itself, causally | null sink] and then competes for the cache.

The cache stays on the chip from a head's first block to its last. The best W of W + C candidates are found by comparing
every pair: a candidate's rank is the number of those that beat it, and a one-hot matrix of ranks gathers the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cache.arrays import Places, Rows, Shape, Tokens, cost
from pallas_kernels.cache.energy import without_dropped
from pallas_kernels.cache.tiles import NT, column, count, dot, index, pick, query_tiles, row


class Saved(NamedTuple):
    """What the backward pass is left with, beside the inputs: W rows a block, a quarter of its tokens at W = C / 4."""

    log_total: Any  # [B, H, 1, T]: logarithm of the softmax's sum
    keys: Any  # [B, H, n, W, K]: of the cache that a block found
    values: Any  # [B, H, n, W, V]
    scores: Any  # [B, H, n, 1, W]
    source: Any  # [B, H, n, 1, W]: which candidate each row of the cache after a block was; -1 for none


class Read(NamedTuple):
    """What a call gives."""

    out: Any  # [B, H, T, V]
    final: Rows  # the cache after the last whole block
    chosen: Any  # [B, H, n, 1, W]: positions that the cache holds after each block
    saved: Saved | None


def read_tiles(
    tokens: Tokens, cache: Rows, sink: Array, document: Array, log_total: Any, energy: float | None = None
) -> Iterator[tuple[slice, Array]]:
    """The read of one block, one tile of queries after the other, float32; of the entries that hold a share `energy` of the
    weights, where it is given."""
    block, window = tokens.keys.shape[0], cache.keys.shape[0]
    filled = cache.scores[...] > -jnp.inf
    own = None if tokens.documents is None else column(tokens.documents[...])
    for tile in query_tiles(block):
        size, seen = tile.stop - tile.start, slice(0, tile.stop)
        visible = index((size, tile.stop), 1) <= index((size, tile.stop), 0) + tile.start
        in_cache = jnp.broadcast_to(filled, (size, window))
        if own is not None:
            others = tokens.documents[:, seen]
            visible &= (own[tile] == others) & (others > 0)
            in_cache &= own[tile] == document
        queries = tokens.queries[tile, :]
        of_cache = jnp.where(in_cache, dot(queries, cache.keys[...], NT), -jnp.inf)
        of_block = jnp.where(visible, dot(queries, tokens.keys[seen, :], NT), -jnp.inf)
        top = jnp.maximum(jnp.max(of_cache, axis=1, keepdims=True), jnp.max(of_block, axis=1, keepdims=True))
        top = jnp.maximum(top, sink)
        of_cache, of_block, of_sink = jnp.exp(of_cache - top), jnp.exp(of_block - top), jnp.exp(sink - top)
        if energy is not None:
            of_cache, of_block, of_sink = without_dropped([of_cache, of_block, of_sink], energy)
        total = jnp.sum(of_cache, axis=1, keepdims=True) + jnp.sum(of_block, axis=1, keepdims=True) + of_sink
        read = dot(of_cache.astype(cache.values.dtype), cache.values[...])
        read = read + dot(of_block.astype(tokens.values.dtype), tokens.values[seen, :])
        if log_total is not None:
            log_total[:, tile] = row(top + jnp.log(total))
        yield tile, read / total


def _chosen(cached: Array, coming: Array) -> tuple[Array, Array]:
    """One-hot [W, W] and [W, C]: which row of the old cache, or which token, each row of the new cache is. The cache is
    in order and earlier than the block, so a row of it is beaten by those before it and by larger tokens only."""
    window, block = cached.shape[1], coming.shape[1]
    cached_column, coming_column = column(cached), column(coming)
    earlier = index((block, block), 0) < index((block, block), 1)
    beats = (coming_column > coming) | ((coming_column == coming) & earlier)
    rank_cached = index((1, window), 1).astype(jnp.float32) + count(coming_column > cached, 0)
    rank_coming = count(cached_column >= coming, 0) + count(beats, 0)

    def one_hot(rank: Array, scores: Array) -> Array:
        place = index((window, rank.shape[1]), 0).astype(jnp.float32)
        return (rank == place) & (scores > -jnp.inf)

    return one_hot(rank_cached, cached), one_hot(rank_coming, coming)


def merge(tokens: Tokens, cache: Rows, before: Any, after: Any, first: Any, source: Any) -> None:
    """The cache of the best W among what it holds and the block; of the document `after` alone."""
    cached, coming = cache.scores[...], tokens.scores[...]
    window, block = cached.shape[1], coming.shape[1]
    if tokens.documents is not None:
        cached = jnp.where(before == after, cached, -jnp.inf)
        coming = jnp.where((tokens.documents[...] == after) & (tokens.documents[...] > 0), coming, -jnp.inf)
    stays, enters = _chosen(cached, coming)

    def taken(old: Array, new: Array, empty: float | int) -> Array:
        """[1, W] of two rows of numbers."""
        best_old = jnp.max(jnp.where(stays, old, empty), axis=1, keepdims=True)
        return row(jnp.maximum(best_old, jnp.max(jnp.where(enters, new, empty), axis=1, keepdims=True)))

    if source is not None:
        source[...] = taken(index((1, window), 1), window + index((1, block), 1), -1)
    for old, new in ((cache.keys, tokens.keys), (cache.values, tokens.values)):
        old[...] = (pick(stays, old[...]) + pick(enters, new[...])).astype(old.dtype)
    cache.positions[...] = taken(cache.positions[...], first + index((1, block), 1), -1)
    cache.scores[...] = taken(cached, coming, -jnp.inf)


def keep(cache: Rows, saved: Saved) -> None:
    """What a block finds; its sources are those of a block that changes nothing, until `merge` writes them."""
    saved.keys[...], saved.values[...] = cache.keys[...], cache.values[...]
    saved.scores[...], saved.source[...] = cache.scores[...], index((1, cache.keys.shape[0]), 1)


def _kernel(
    start: Any,
    whole: Any,
    documents: Any,
    tokens: Tokens,
    sink: Any,
    initial: Rows,
    out: Any,
    final: Rows,
    chosen: Any,
    saved: Saved | None,
    cache: Rows,
    *,
    energy: float | None,
) -> None:
    """One block of one head. `documents` [B, n + 1] is that of the cache before each block and after the last."""
    b, h, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    block = tokens.keys.shape[0]

    @pl.when(i == 0)
    def _() -> None:
        for mine, given in zip(cache, initial, strict=True):
            mine[...] = given[...]

    if saved is not None:
        keep(cache, saved)
    before, after = documents[b, i], documents[b, i + 1]
    total = None if saved is None else saved.log_total
    for tile, read in read_tiles(tokens, cache, sink[h], before, total, energy):
        out[tile, :] = read.astype(out.dtype)

    @pl.when(i < whole[b])
    def _() -> None:
        merge(tokens, cache, before, after, start[b] + i * block, None if saved is None else saved.source)

    chosen[...] = cache.positions[...]

    @pl.when(i == pl.num_programs(2) - 1)
    def _() -> None:
        for theirs, mine in zip(final, cache, strict=True):
            theirs[...] = mine[...]


def row_specs(places: Places) -> Rows:
    window, key_dim, value_dim = places.shape.window, places.shape.key_dim, places.shape.value_dim
    return Rows(*(places.of_head(*size) for size in ((window, key_dim), (window, value_dim), (1, window), (1, window))))


def token_specs(places: Places, documents: bool) -> Tokens:
    shape = places.shape
    keys = places.tokens(shape.key_dim, shape.group)
    documents_spec = places.documents() if documents else None
    return Tokens(
        places.tokens(shape.key_dim), keys, places.tokens(shape.value_dim), places.token_row(), documents_spec
    )


def saved_specs(places: Places) -> Saved:
    window, key_dim, value_dim = places.shape.window, places.shape.key_dim, places.shape.value_dim
    sizes = (window, key_dim), (window, value_dim), (1, window), (1, window)
    return Saved(places.token_row(), *(places.of_block(*size) for size in sizes))


def forward(
    shape: Shape,
    counts: tuple[Array, Array, Array],
    tokens: Tokens,
    sink: Array,
    initial: Rows,
    *,
    save: bool,
    out_dtype: Any,
    energy: float | None,
    interpret: Any,
) -> Read:
    """The read of all blocks and the cache after them. `counts`: position of each batch row's first token, how many of
    its blocks are whole, and the cache's document before each block and after the last."""
    places, dtype = Places(shape), tokens.keys.dtype
    per_head, per_block = shape[:2], (*shape[:2], shape.blocks)
    rows = Rows(initial.keys.shape, initial.values.shape, (*per_head, 1, shape.window), (*per_head, 1, shape.window))
    types = Rows(dtype, dtype, jnp.float32, jnp.int32)
    saved = None
    if save:
        log_total = jax.ShapeDtypeStruct((*per_head, 1, shape.blocks * shape.block), jnp.float32)
        kept = (jax.ShapeDtypeStruct((*per_block, *s[2:]), t) for s, t in zip(rows, types, strict=True))
        saved = Saved(log_total, *kept)
    result = Read(
        jax.ShapeDtypeStruct(shape.tokens(shape.value_dim), out_dtype),
        Rows(*(jax.ShapeDtypeStruct(s, t) for s, t in zip(rows, types, strict=True))),
        jax.ShapeDtypeStruct((*per_block, 1, shape.window), jnp.int32),
        saved,
    )
    return pl.pallas_call(
        functools.partial(_kernel, energy=energy),
        out_shape=result,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(shape.batch, shape.heads, shape.blocks),
            in_specs=[
                token_specs(places, tokens.documents is not None),
                pl.BlockSpec(memory_space=pltpu.SMEM),
                row_specs(places),
            ],
            out_specs=Read(
                places.tokens(shape.value_dim),
                row_specs(places),
                places.of_block(1, shape.window),
                saved_specs(places) if save else None,
            ),
            scratch_shapes=[Rows(*(pltpu.VMEM(s[2:], t) for s, t in zip(rows, types, strict=True)))],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(shape, reads=2, picks=2, arrays=(tokens, initial, result)),
        interpret=interpret,
        name="hola_cache_forward",
    )(*counts, tokens, sink, initial)
