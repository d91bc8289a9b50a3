"""The read: softmax attention of each token over its visible set, [cache | running block up to itself | null sink].

Blocks are read one after the other, so that what is in flight does not grow with T. Inside a block the causal triangle is
cut into tiles of queries, and each tile meets only the keys that its last query may see. Logits lie keys by queries: sums
over keys then run along whole vectors of queries. The backward pass makes the probabilities again from the logarithm of
their sum. Tokens come as they lie in the model, heads behind them; a block's are turned heads first where they are small
enough to stay in a core's cache.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hola_jax.array_types import Array, Bool, Float


class Visible(NamedTuple):
    """What the tokens of each block can see; C tokens to a block, stacked over blocks."""

    cache_keys: Float[Array, "n B h r W K"]
    cache_values: Float[Array, "n B h r W V"]
    block_keys: Float[Array, "n B C h 1 K"]
    block_values: Float[Array, "n B C h r V"]
    sink_logit: Float[Array, "h r"]


class Masks(NamedTuple):
    """Which of it belongs to the token's own document, keys by queries; all but `filled` is None where there is one
    document."""

    filled: Bool[Array, "n B h r W 1"]  # the cache row holds a token
    cache: Bool[Array, "n B 1 1 1 C"] | None  # the token belongs to the document of the cache
    block: Bool[Array, "n B 1 1 C C"] | None  # two tokens of the block belong to one document


def heads_first(x: Float[Array, "B C h r X"]) -> Float[Array, "B h r C X"]:
    return x.transpose(0, 2, 3, 1, 4)


def tokens_first(x: Float[Array, "B h r C X"]) -> Float[Array, "B C h r X"]:
    return x.transpose(0, 3, 1, 2, 4)


def _turned(visible: Visible) -> Visible:
    """One block's rows, all heads first."""
    return visible._replace(block_keys=heads_first(visible.block_keys), block_values=heads_first(visible.block_values))


def query_tiles(block: int) -> list[slice]:
    """The queries of a block in at most four tiles of one size."""
    size = block // max(count for count in (1, 2, 3, 4) if block % count == 0)
    return [slice(start, start + size) for start in range(0, block, size)]


def _dot(spec: str, stored: Array, other: Array) -> Array:
    """A product in the type of the stored rows, accumulated in float32."""
    return jnp.einsum(
        spec, stored, other.astype(stored.dtype), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _logits(queries: Array, cache_keys: Array, block_keys: Array, masks: Masks) -> tuple[Array, list[Array]]:
    """Logits of one block: the cache's rows by all queries, and for each tile the block's keys it may see by its queries."""
    allowed = masks.filled if masks.cache is None else masks.filled & masks.cache
    cache = jnp.where(allowed, _dot("...wk,...ck->...wc", cache_keys, queries), -jnp.inf)
    block, tiles = queries.shape[-2], []
    for tile in query_tiles(block):
        causal = jnp.asarray(np.tri(block, dtype=bool)[tile, : tile.stop].T)
        if masks.block is not None:
            causal = causal & masks.block[..., : tile.stop, tile]
        logits = _dot("...jk,...ck->...jc", block_keys[..., : tile.stop, :], queries[..., tile, :])
        tiles.append(jnp.where(causal, logits, -jnp.inf))
    return cache, tiles


def _largest(cache: Array, tiles: list[Array], sink: Array) -> Array:
    """The largest logit of each query, [B, h, r, 1, C]."""
    top = jnp.concatenate([jnp.max(logits, axis=-2, keepdims=True) for logits in tiles], axis=-1)
    return jnp.maximum(jnp.maximum(top, jnp.max(cache, axis=-2, keepdims=True, initial=-jnp.inf)), sink)


def least_logit(logits: Float[Array, "... X C"], energy: float) -> Float[Array, "... 1 C"]:
    """Below which logits are dropped when each query keeps the fewest entries whose softmax weights reach `energy`. It lies
    between the last logit kept and the first dropped, so that rounding moves none across it."""
    ordered = -jnp.sort(-logits, axis=-2)
    weights = jax.nn.softmax(ordered, axis=-2)
    kept = jnp.cumsum(weights, axis=-2) - weights < energy
    last = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-2, keepdims=True)
    first = jnp.max(jnp.where(kept, -jnp.inf, ordered), axis=-2, keepdims=True)
    return jnp.where(jnp.isfinite(last) & jnp.isfinite(first), (last + first) / 2, last)


def _least_of_block(cache: Array, tiles: list[Array], sink: Array, energy: float) -> Array:
    """`least_logit` of each query of a block, [B, h, r, 1, C]."""
    parts = []
    for tile, logits in zip(query_tiles(cache.shape[-1]), tiles, strict=True):
        of_sink = jnp.broadcast_to(sink, (*logits.shape[:-2], 1, logits.shape[-1]))
        parts.append(least_logit(jnp.concatenate([cache[..., tile], logits, of_sink], axis=-2), energy))
    return jnp.concatenate(parts, axis=-1)


def _dropped(cache: Array, tiles: list[Array], sink: Array, least: Array | None) -> tuple[Array, list[Array], Array]:
    """The logits without those below `least`."""
    if least is None:
        return cache, tiles, sink
    blocks = query_tiles(cache.shape[-1])
    tiles = [
        jnp.where(logits >= least[..., tile], logits, -jnp.inf) for tile, logits in zip(blocks, tiles, strict=True)
    ]
    return jnp.where(cache >= least, cache, -jnp.inf), tiles, jnp.where(sink >= least, sink, -jnp.inf)


def _read_block(
    queries: Array, visible: Visible, masks: Masks, energy: float | None
) -> tuple[Array, Array, Array | None]:
    """One block: (what is read [B, C, h, r, V], logarithm of the softmax's sum [B, h, r, 1, C], the least logit that
    counts, alike)."""
    queries, visible = heads_first(queries), _turned(visible)
    cache, tiles = _logits(queries, visible.cache_keys, visible.block_keys, masks)
    sink = visible.sink_logit[:, :, None, None]
    least = None if energy is None else _least_of_block(cache, tiles, sink, energy)
    cache, tiles, sink = _dropped(cache, tiles, sink, least)
    top = _largest(cache, tiles, sink)
    weights = jnp.exp(cache - top)
    total = jnp.sum(weights, axis=-2, keepdims=True) + jnp.exp(sink - top)
    out = _dot("...wv,...wc->...cv", visible.cache_values, weights)
    parts, sums = [], []
    for tile, logits in zip(query_tiles(queries.shape[-2]), tiles, strict=True):
        weights = jnp.exp(logits - top[..., tile])
        sums.append(jnp.sum(weights, axis=-2, keepdims=True))
        parts.append(_dot("...jv,...jc->...cv", visible.block_values[..., : tile.stop, :], weights))
    total = total + jnp.concatenate(sums, axis=-1)
    out = (out + jnp.concatenate(parts, axis=-2)) / jnp.swapaxes(total, -1, -2)
    return tokens_first(out), top + jnp.log(total), least


def mass_received(
    queries: Float[Array, "B C h r K"],
    cache_keys: Float[Array, "B h r W K"],
    block_keys: Float[Array, "B C h 1 K"],
    sink_logit: Float[Array, "h r"],
    masks: Masks,
    asking: Bool[Array, "B C"],
) -> tuple[Float[Array, "B h r W"], Float[Array, "B h r C"]]:
    """Of the reads of one block by those of its tokens that are `asking`: the softmax weights that each row of the cache
    gets, added up, and each token of the block."""
    block, sink = queries.shape[1], sink_logit.astype(jnp.float32)[:, :, None, None]
    cache, tiles = _logits(heads_first(queries), cache_keys, heads_first(block_keys), masks)
    top = _largest(cache, tiles, sink)
    of_cache, of_tiles = jnp.exp(cache - top), []
    total = jnp.sum(of_cache, axis=-2, keepdims=True) + jnp.exp(sink - top)
    for tile, logits in zip(query_tiles(block), tiles, strict=True):
        of_tiles.append(jnp.exp(logits - top[..., tile]))
        total = total.at[..., tile].add(jnp.sum(of_tiles[-1], axis=-2, keepdims=True))
    share = jnp.where(asking[:, None, None, None], 1 / total, 0.0)
    of_block = jnp.zeros((*share.shape[:3], block), jnp.float32)
    for tile, weights in zip(query_tiles(block), of_tiles, strict=True):
        of_block = of_block.at[..., : tile.stop].add(jnp.sum(weights * share[..., tile], axis=-1))
    return jnp.sum(of_cache * share, axis=-1), of_block


def _block_gradient(
    queries: Array,
    visible: Visible,
    masks: Masks,
    out: Array,
    log_total: Array,
    least: Array | None,
    d_out: Array,
) -> tuple[Array, Visible]:
    """Of one block, by its queries and by what it saw."""
    given, visible = visible, _turned(visible)
    queries, out, d_out = heads_first(queries), heads_first(out), heads_first(d_out)
    cache, tiles = _logits(queries, visible.cache_keys, visible.block_keys, masks)
    cache, tiles, sink = _dropped(cache, tiles, visible.sink_logit[:, :, None, None], least)
    spent = jnp.swapaxes(jnp.sum(d_out * out, axis=-1, keepdims=True), -1, -2)
    sink_weight = jnp.exp(sink - log_total)

    def through(logits: Array, tile: slice, keys: Array, values: Array) -> tuple[Array, Array, Array]:
        weights = jnp.exp(logits - log_total[..., tile])
        d_logits = weights * (_dot("...jv,...cv->...jc", values, d_out[..., tile, :]) - spent[..., tile])
        d_queries = _dot("...jk,...jc->...ck", keys, d_logits)
        d_keys = _dot("...ck,...jc->...jk", queries[..., tile, :].astype(keys.dtype), d_logits)
        return d_queries, d_keys, _dot("...cv,...jc->...jv", d_out[..., tile, :].astype(values.dtype), weights)

    block = queries.shape[-2]
    d_queries, d_cache_keys, d_cache_values = through(cache, slice(0, block), visible.cache_keys, visible.cache_values)
    d_keys, d_values, parts = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), []
    for tile, logits in zip(query_tiles(block), tiles, strict=True):
        seen = slice(0, tile.stop)
        part, keys, values = through(logits, tile, visible.block_keys[..., seen, :], visible.block_values[..., seen, :])
        unseen = [(0, 0)] * (keys.ndim - 2) + [(0, block - tile.stop), (0, 0)]
        parts.append(part)
        d_keys, d_values = d_keys + jnp.pad(keys, unseen), d_values + jnp.pad(values, unseen)
    gradient = Visible(
        d_cache_keys,
        d_cache_values,
        tokens_first(jnp.sum(d_keys, axis=-3, keepdims=True)),
        tokens_first(d_values),
        -jnp.sum(sink_weight * spent, axis=(0, -2, -1)),
    )
    gradient = jax.tree.map(lambda d, x: d.astype(x.dtype), gradient, given)
    return tokens_first(d_queries + jnp.concatenate(parts, axis=-2)).astype(queries.dtype), gradient


def _of_blocks(visible: Visible, blocks: int) -> Visible:
    """With the sink's logit once for each block, as the rest is."""
    sink = visible.sink_logit.astype(jnp.float32)
    return visible._replace(sink_logit=jnp.broadcast_to(sink, (blocks, *sink.shape)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def read_visible(
    queries: Float[Array, "n B C h r K"], visible: Visible, masks: Masks, energy: float | None = None
) -> Float[Array, "n B C h r V"]:
    """The read, in float32. Queries come with the softmax's temperature multiplied in. With `energy` each query keeps the
    fewest entries, the null sink among them, whose weights reach it."""
    return _read_forward(queries, visible, masks, energy)[0]


def _read_forward(
    queries: Array, visible: Visible, masks: Masks, energy: float | None
) -> tuple[Array, tuple[Any, ...]]:
    blocks = (queries, _of_blocks(visible, queries.shape[0]), masks)
    out, log_total, least = lax.map(lambda block: _read_block(block[0], block[1], block[2], energy), blocks)
    return out, (queries, visible, masks, out, log_total, least)


def _read_backward(energy: float | None, saved: tuple[Any, ...], d_out: Array) -> tuple[Array, Visible, None]:
    queries, visible, masks, out, log_total, least = saved
    blocks = (queries, _of_blocks(visible, queries.shape[0]), masks, out, log_total, least, d_out)
    d_queries, gradient = lax.map(lambda block: _block_gradient(*block), blocks)
    d_sink = jnp.sum(gradient.sink_logit, axis=0).astype(visible.sink_logit.dtype)
    return d_queries, gradient._replace(sink_logit=d_sink), None


read_visible.defvjp(_read_forward, _read_backward)


def read_token(
    query: Float[Array, "B h r K"],
    keys: list[Float[Array, "B h _ _ K"]],
    values: list[Float[Array, "B h r _ V"]],
    allowed: list[Bool[Array, "B h r _"]],
    sink_logit: Float[Array, "h r"],
    energy: float | None = None,
) -> tuple[Float[Array, "B h r V"], Float[Array, "B h r X"]]:
    """The read of one token over several stores of rows and the null sink, in float32; and the weights of the rows, X of
    all stores together, before those that `energy` drops are."""
    logits = [
        jnp.where(mask, _dot("bhrxk,bhrk->bhrx", store, query), -jnp.inf)
        for store, mask in zip(keys, allowed, strict=True)
    ]
    sink = jnp.broadcast_to(sink_logit.astype(jnp.float32)[..., None], (*query.shape[:-1], 1))
    entries = jnp.concatenate([*logits, sink], axis=-1)
    weights = kept = jax.nn.softmax(entries, axis=-1)
    if energy is not None:
        least = least_logit(lax.stop_gradient(entries)[..., None], energy)[..., 0]
        kept = jax.nn.softmax(jnp.where(entries >= least, entries, -jnp.inf), axis=-1)
    out, start = jnp.zeros((), jnp.float32), 0
    for store in values:
        stop = start + store.shape[-2]
        out, start = out + _dot("bhrxv,bhrx->bhrv", store, kept[..., start:stop]), stop
    return out, weights[..., :-1]
