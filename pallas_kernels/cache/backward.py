"""The backward kernel: the blocks in reverse, with the gradient of the cache on the chip.

A row's gradient gathers what every block that read it says, until the merge is met at which the row's token came in; there
the one-hot matrix, transposed, hands it to the token. Nothing is added in an order that could vary. Logits lie keys by
queries, so that what belongs to a query, as the softmax's sum does, is a row of numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cache.arrays import Places, Shape, Tokens, cost
from pallas_kernels.cache.forward import Saved, saved_specs, token_specs
from pallas_kernels.cache.tiles import NT, TN, column, dot, hand_back, index, query_tiles


class Gradient(NamedTuple):
    """By the inputs. Those of keys are one for each value head; who shares a key head is summed over by the caller."""

    queries: Any  # [B, H, T, K]
    keys: Any  # [B, H, T, K]
    values: Any  # [B, H, T, V]
    sink: Any  # [B, H, 1, C], to be summed over
    cache_keys: Any  # [B, H, W, K]
    cache_values: Any  # [B, H, W, V]


class Sums(NamedTuple):
    """What is added up on the chip, float32."""

    cache_keys: Any  # [W, K]: of the cache as the block leaves it, then as it finds it
    cache_values: Any  # [W, V]
    keys: Any  # [C, K]: of the block
    values: Any  # [C, V]
    sink: Any  # [1, C]
    gate: Any = None  # [1, C], where a gate stands behind the read


def through_merge(source: Array, sums: Sums, dtype: Any) -> None:
    """From the rows of the cache behind a block to those in front of it and to the block's tokens."""
    window, block = source.shape[1], sums.keys.shape[0]
    stayed = source == index((window, window), 0)
    entered = source == window + index((block, window), 0)
    for of_cache, of_block in ((sums.cache_keys, sums.keys), (sums.cache_values, sums.values)):
        behind = of_cache[...]
        of_block[...] = hand_back(entered, behind, dtype)
        of_cache[...] = hand_back(stayed, behind, dtype)


def through_read(
    tokens: Tokens,
    saved: Saved,
    sink: Array,
    document: Array,
    d_out: Any,
    d_queries: Any,
    sums: Sums,
    gate: Array | None = None,
) -> None:
    """Adds what the block's read says of the cache it found and of its own tokens. `d_out` is the gradient by the read,
    or by the read times a `gate`."""
    filled = column(saved.scores[...]) > -jnp.inf
    own = None if tokens.documents is None else column(tokens.documents[...])
    cached, values = saved.keys[...], saved.values[...]
    for tile in query_tiles(tokens.keys.shape[0]):
        size, seen = tile.stop - tile.start, slice(0, tile.stop)
        visible = index((tile.stop, size), 0) <= index((tile.stop, size), 1) + tile.start
        in_cache = jnp.broadcast_to(filled, (filled.shape[0], size))
        if own is not None:
            asking = tokens.documents[:, tile]
            visible &= (own[seen] == asking) & (asking > 0)
            in_cache &= asking == document
        queries, d_read = tokens.queries[tile, :], d_out[tile, :].astype(values.dtype)
        keys, log_total = tokens.keys[seen, :], saved.log_total[:, tile]
        of_cache = jnp.exp(jnp.where(in_cache, dot(cached, queries, NT), -jnp.inf) - log_total)
        of_block = jnp.exp(jnp.where(visible, dot(keys, queries, NT), -jnp.inf) - log_total)
        d_cache, d_block = dot(values, d_read, NT), dot(tokens.values[seen, :], d_read, NT)
        spent = jnp.sum(of_cache * d_cache, axis=0, keepdims=True) + jnp.sum(of_block * d_block, axis=0, keepdims=True)
        of_sink = jnp.exp(sink - log_total)
        if gate is not None:
            sums.gate[:, tile] += spent
            of_cache, of_block, of_sink = gate * of_cache, gate * of_block, gate * of_sink
        sums.sink[:, tile] -= of_sink * spent
        d_cache = (of_cache * (d_cache - spent)).astype(keys.dtype)
        d_block = (of_block * (d_block - spent)).astype(keys.dtype)
        d_queries[tile, :] = (dot(d_cache, cached, TN) + dot(d_block, keys, TN)).astype(d_queries.dtype)
        sums.cache_keys[...] += dot(d_cache, queries)
        sums.cache_values[...] += dot(of_cache.astype(values.dtype), d_read)
        sums.keys[seen, :] += dot(d_block, queries)
        sums.values[seen, :] += dot(of_block.astype(values.dtype), d_read)


def _kernel(
    documents: Any,
    tokens: Tokens,
    sink: Any,
    saved: Saved,
    d_out: Any,
    d_final: tuple[Any, Any],
    d_queries: Any,
    d_keys: Any,
    d_values: Any,
    d_sink: Any,
    d_cache_keys: Any,
    d_cache_values: Any,
    sums: Sums,
) -> None:
    """One block of one head, the last block first."""
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _() -> None:
        sums.cache_keys[...], sums.cache_values[...] = (d[...].astype(jnp.float32) for d in d_final)
        sums.sink[...] = jnp.zeros_like(sums.sink)

    through_merge(saved.source[...], sums, d_values.dtype)
    document = documents[pl.program_id(0), steps - 1 - step]
    through_read(tokens, saved, sink[pl.program_id(1)], document, d_out, d_queries, sums)
    d_keys[...] = sums.keys[...].astype(d_keys.dtype)
    d_values[...] = sums.values[...].astype(d_values.dtype)

    @pl.when(step == steps - 1)
    def _() -> None:
        d_sink[...] = sums.sink[...]
        d_cache_keys[...] = sums.cache_keys[...].astype(d_cache_keys.dtype)
        d_cache_values[...] = sums.cache_values[...].astype(d_cache_values.dtype)


def backward(
    shape: Shape,
    documents: Array,
    tokens: Tokens,
    sink: Array,
    saved: Saved,
    d_out: Array,
    d_final: tuple[Array, Array],
    *,
    interpret: Any,
) -> Gradient:
    """The gradient by everything that has one. `documents` [B, n + 1] is that of the cache before each block; `d_final`
    is the gradient by the final cache's keys and values."""
    places = Places(shape, lambda step: shape.blocks - 1 - step)
    per_head, dtype = shape[:2], tokens.keys.dtype
    block, window, key_dim, value_dim = shape[4:]
    of_keys, of_values = places.tokens(key_dim), places.tokens(value_dim)
    cache_specs = places.of_head(window, key_dim), places.of_head(window, value_dim)
    # Value heads that share a key head are summed over outside, and should not be rounded before.
    by_key = jax.ShapeDtypeStruct(shape.tokens(key_dim), dtype if shape.group == 1 else jnp.float32)
    result = Gradient(
        jax.ShapeDtypeStruct(shape.tokens(key_dim), dtype),
        by_key,
        jax.ShapeDtypeStruct(shape.tokens(value_dim), dtype),
        jax.ShapeDtypeStruct((*per_head, 1, block), jnp.float32),
        jax.ShapeDtypeStruct((*per_head, window, key_dim), dtype),
        jax.ShapeDtypeStruct((*per_head, window, value_dim), dtype),
    )
    passes = 2 if dtype == jnp.bfloat16 else 1  # see `tiles.hand_back`
    sizes = (window, key_dim), (window, value_dim), (block, key_dim), (block, value_dim), (1, block)
    return pl.pallas_call(
        _kernel,
        out_shape=result,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(shape.batch, shape.heads, shape.blocks),
            in_specs=[
                token_specs(places, tokens.documents is not None)._replace(scores=None),
                pl.BlockSpec(memory_space=pltpu.SMEM),
                saved_specs(places),
                of_values,
                cache_specs,
            ],
            out_specs=Gradient(of_keys, of_keys, of_values, places.of_head(1, block), *cache_specs),
            scratch_shapes=[Sums(*(pltpu.VMEM(size, jnp.float32) for size in sizes))],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(shape, reads=5, picks=2 * passes, arrays=(tokens, saved, d_out, d_final, result)),
        interpret=interpret,
        name="hola_cache_backward",
    )(documents, tokens._replace(scores=None), sink, saved, d_out, d_final)
