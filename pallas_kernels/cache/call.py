"""HOLA's exact cache on a TPU: the read over [cache | running block | null sink] and the top-W merge, in one kernel."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.cache.arrays import Cache, Rows, Shape, Tokens
from pallas_kernels.cache.backward import backward
from pallas_kernels.cache.forward import Read, Saved, forward
from pallas_kernels.cache.limits import refuse_arrays, refuse_gradient, refuse_sizes

Counts = tuple[Array, Array, Array]


class Static(NamedTuple):
    """What a compiled call depends on beside its arrays."""

    shape: Shape
    out_dtype: Any
    energy: float | None
    interpret: Any


def empty_cache(batch: int, heads: int, window: int, key_dim: int, value_dim: int, dtype: DTypeLike) -> Cache:
    """The cache before any token."""
    rows = batch, heads, window
    return Cache(
        jnp.zeros((*rows, key_dim), dtype),
        jnp.zeros((*rows, value_dim), dtype),
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.full(rows, -1, jnp.int32),
        jnp.zeros(batch, jnp.int32),
    )


def cached_read(
    queries: Array,
    keys: Array,
    values: Array,
    scores: Array,
    sink_logit: Array,
    cache: Cache | None = None,
    *,
    documents: Array | None = None,
    start: Array | None = None,
    whole: Array | None = None,
    window: int,
    block: int,
    out_dtype: DTypeLike | None = None,
    energy: float | None = None,
    interpret: Any = False,
) -> tuple[Array, Cache, Array]:
    """What each token reads [B, T, H, V], the cache after the whole blocks, and the positions that the cache holds after
    each block [B, H, n, W].

    queries [B, T, H, K], normalised, the softmax's temperature multiplied in; keys [B, T, h, K] as stored, values
    [B, T, H, V], scores [B, H, T] (float32, no NaN), sink_logit [H]. Place 0 begins a block. `documents` [B, T] are ids
    that rise along T, 0 at padding; None where all tokens are real and of the cache's document. `start` [B] is the
    position of place 0, `whole` [B] how many blocks of each row are complete (T // C): the block behind them is read and
    does not compete. `cache` must be in order, as it is given back. The gradient flows to queries, keys, values,
    sink_logit and the cache's keys and values; not to scores. With `energy` each query keeps the fewest entries, the null
    sink among them, whose softmax weights reach that share, and there is no gradient.
    """
    refuse_arrays(queries, keys, values, scores, cache)
    batch, length, heads, key_dim = queries.shape
    blocks = max(1, -(-length // block))
    shape = Shape(batch, heads, heads // keys.shape[2], blocks, block, window, key_dim, values.shape[3])
    refuse_sizes(shape, keys.dtype.itemsize, bool(interpret))
    cache = empty_cache(batch, heads, window, key_dim, values.shape[3], keys.dtype) if cache is None else cache
    whole = jnp.full(batch, length // block, jnp.int32) if whole is None else whole
    start = jnp.zeros(batch, jnp.int32) if start is None else start
    of_cache = document_counts(cache.document, documents, blocks, block)
    counts = start.astype(jnp.int32), whole.astype(jnp.int32), of_cache
    tail = blocks * block - length

    def padded(x: Array, axis: int = 1) -> Array:
        return jnp.pad(x, [(0, tail if a == axis else 0) for a in range(x.ndim)])

    tokens = Tokens(
        padded(queries.astype(keys.dtype)).swapaxes(1, 2),
        padded(keys).swapaxes(1, 2),
        padded(values).swapaxes(1, 2),
        padded(scores.astype(jnp.float32), axis=2)[:, :, None],
        None if documents is None else padded(documents.astype(jnp.int32))[:, None],
    )
    initial = Rows(cache.keys, cache.values, *(x[:, :, None] for x in cache[2:4]))
    static = Static(shape, jnp.dtype(out_dtype or values.dtype), energy, interpret)
    out, final, chosen = _cached_read(static, counts, tokens, sink_logit.astype(jnp.float32), initial)
    document = jnp.take_along_axis(counts[2], whole[:, None], axis=1)[:, 0]
    after = Cache(final.keys, final.values, final.scores[:, :, 0], final.positions[:, :, 0], document)
    return out.swapaxes(1, 2)[:, :length], after, chosen[:, :, :, 0]


def document_counts(document: Array, documents: Array | None, blocks: int, block: int) -> Array:
    """The cache's document before each block and after the last [B, n + 1]; `document` [B] is that which it comes with."""
    if documents is None:
        return jnp.broadcast_to(document[:, None], (document.shape[0], blocks + 1))
    tail = blocks * block - documents.shape[1]
    by_block = jnp.pad(documents, [(0, 0), (0, tail)]).reshape(documents.shape[0], blocks, block)
    latest = jnp.concatenate([document[:, None], jnp.max(by_block, axis=2)], axis=1)
    return jax.lax.cummax(latest.astype(jnp.int32), axis=1)


def _run(static: Static, counts: Counts, tokens: Tokens, sink: Array, initial: Rows, save: bool) -> Read:
    options = {"save": save, "out_dtype": static.out_dtype, "energy": static.energy, "interpret": static.interpret}
    return forward(static.shape, counts, tokens, sink, initial, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cached_read(
    static: Static, counts: Counts, tokens: Tokens, sink: Array, initial: Rows
) -> tuple[Array, Rows, Array]:
    """All heads first."""
    return _run(static, counts, tokens, sink, initial, save=False)[:3]


def _forward(static: Static, counts: Counts, tokens: Tokens, sink: Array, initial: Rows) -> tuple[Any, Any]:
    refuse_gradient(static.energy)
    read = _run(static, counts, tokens, sink, initial, save=True)
    return read[:3], (counts, tokens, sink, read.saved)


def _backward(static: Static, kept: tuple[Counts, Tokens, Array, Saved], given: tuple[Array, Rows, Array]) -> Any:
    counts, tokens, sink, saved = kept
    d_out, d_final, _ = given
    d_cache = d_final.keys, d_final.values
    d = backward(static.shape, counts[2], tokens, sink, saved, d_out, d_cache, interpret=static.interpret)
    d_keys, shape = d.keys, tokens.keys.shape
    if static.shape.group > 1:
        d_keys = d_keys.reshape(*shape[:2], static.shape.group, *shape[2:]).sum(axis=2).astype(tokens.keys.dtype)
    d_tokens = Tokens(d.queries, d_keys, d.values, None, None)
    return None, d_tokens, jnp.sum(d.sink, axis=(0, 2, 3)), Rows(d.cache_keys, d.cache_values, None, None)


_cached_read.defvjp(_forward, _backward)
