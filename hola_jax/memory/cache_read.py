"""The read: softmax attention of each token over its visible set, [cache | running block up to itself | null sink].

Blocks are read in parallel. Inside a block the causal triangle is cut into tiles of rows, and each tile meets only the
keys that its last row may see. The backward pass makes the probabilities again from the logarithm of their sum.
"""

from __future__ import annotations

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
    block_keys: Float[Array, "n B h 1 C K"]
    block_values: Float[Array, "n B h r C V"]
    sink_logit: Float[Array, "h r"]


class Masks(NamedTuple):
    """Which of it belongs to the token's own document; all but `filled` is None where there is one document."""

    filled: Bool[Array, "n B h r 1 W"]  # the cache row holds a token
    cache: Bool[Array, "n B 1 1 C 1"] | None  # the token belongs to the document of the cache
    block: Bool[Array, "n B 1 1 C C"] | None  # two tokens of the block belong to one document


def row_tiles(block: int) -> list[slice]:
    """The rows of a block in at most four tiles of one size."""
    size = block // max(count for count in (1, 2, 3, 4) if block % count == 0)
    return [slice(start, start + size) for start in range(0, block, size)]


def _dot(spec: str, left: Array, right: Array) -> Array:
    """A product in the type of `right` (that of the stored rows), accumulated in float32."""
    return jnp.einsum(
        spec, left.astype(right.dtype), right, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _logits(queries: Array, visible: Visible, masks: Masks) -> tuple[Array, list[Array]]:
    """Logits of the cache rows, and of each tile of rows with the block's keys it may see."""
    allowed = masks.filled if masks.cache is None else masks.filled & masks.cache
    cache = jnp.where(allowed, _dot("...ck,...wk->...cw", queries, visible.cache_keys), -jnp.inf)
    block, tiles = queries.shape[-2], []
    for rows in row_tiles(block):
        causal = jnp.asarray(np.tri(block, dtype=bool)[rows, : rows.stop])
        if masks.block is not None:
            causal = causal & masks.block[..., rows, : rows.stop]
        logits = _dot("...ck,...jk->...cj", queries[..., rows, :], visible.block_keys[..., : rows.stop, :])
        tiles.append(jnp.where(causal, logits, -jnp.inf))
    return cache, tiles


@jax.custom_vjp
def read_visible(queries: Float[Array, "n B h r C K"], visible: Visible, masks: Masks) -> Float[Array, "n B h r C V"]:
    """The read, in float32. Queries come with the softmax's temperature multiplied in."""
    return _read_forward(queries, visible, masks)[0]


def _read_forward(queries: Array, visible: Visible, masks: Masks) -> tuple[Array, tuple[Any, ...]]:
    cache, tiles = _logits(queries, visible, masks)
    sink = visible.sink_logit.astype(jnp.float32)[:, :, None, None]
    block_top = jnp.concatenate([jnp.max(tile, axis=-1, keepdims=True) for tile in tiles], axis=-2)
    top = jnp.maximum(block_top, jnp.max(cache, axis=-1, keepdims=True, initial=-jnp.inf))
    top = jnp.maximum(top, sink)
    weights = jnp.exp(cache - top)
    total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top)
    out = _dot("...cw,...wv->...cv", weights, visible.cache_values)
    parts, sums = [], []
    for rows, tile in zip(row_tiles(queries.shape[-2]), tiles, strict=True):
        weights = jnp.exp(tile - top[..., rows, :])
        sums.append(jnp.sum(weights, axis=-1, keepdims=True))
        parts.append(_dot("...cj,...jv->...cv", weights, visible.block_values[..., : rows.stop, :]))
    total = total + jnp.concatenate(sums, axis=-2)
    out = (out + jnp.concatenate(parts, axis=-2)) / total
    return out, (queries, visible, masks, out, top + jnp.log(total))


def _read_backward(saved: tuple[Any, ...], d_out: Array) -> tuple[Array, Visible, None]:
    queries, visible, masks, out, log_total = saved
    cache, tiles = _logits(queries, visible, masks)
    sink = visible.sink_logit.astype(jnp.float32)[:, :, None, None]
    spent = jnp.sum(d_out * out, axis=-1, keepdims=True)
    d_sink = -jnp.sum(jnp.exp(sink - log_total) * spent, axis=(0, 1, -2, -1))

    def through(logits: Array, rows: slice, keys: Array, values: Array) -> tuple[Array, Array, Array]:
        weights = jnp.exp(logits - log_total[..., rows, :])
        d_values = _dot("...cj,...cv->...jv", weights, d_out[..., rows, :].astype(values.dtype))
        d_logits = weights * (_dot("...cv,...jv->...cj", d_out[..., rows, :], values) - spent[..., rows, :])
        d_queries = _dot("...cj,...jk->...ck", d_logits, keys)
        return d_queries, _dot("...cj,...ck->...jk", d_logits, queries[..., rows, :]), d_values

    block = queries.shape[-2]
    d_queries, d_cache_keys, d_cache_values = through(cache, slice(0, block), visible.cache_keys, visible.cache_values)
    d_keys = jnp.zeros((*out.shape[:-2], block, queries.shape[-1]), jnp.float32)
    d_values = jnp.zeros((*out.shape[:-1], visible.block_values.shape[-1]), jnp.float32)
    parts = []
    for rows, tile in zip(row_tiles(block), tiles, strict=True):
        seen = slice(0, rows.stop)
        part, keys, values = through(tile, rows, visible.block_keys[..., seen, :], visible.block_values[..., seen, :])
        parts.append(part)
        d_keys = d_keys.at[..., seen, :].add(keys)
        d_values = d_values.at[..., seen, :].add(values)
    gradient = Visible(
        d_cache_keys, d_cache_values, jnp.sum(d_keys, axis=3, keepdims=True), d_values, d_sink.astype(jnp.float32)
    )
    gradient = jax.tree.map(lambda d, x: d.astype(x.dtype), gradient, visible)
    return (d_queries + jnp.concatenate(parts, axis=-2)).astype(queries.dtype), gradient, None


read_visible.defvjp(_read_forward, _read_backward)


def read_token(
    query: Float[Array, "B h r K"],
    keys: list[Float[Array, "B h _ _ K"]],
    values: list[Float[Array, "B h r _ V"]],
    allowed: list[Bool[Array, "B h r _"]],
    sink_logit: Float[Array, "h r"],
) -> Float[Array, "B h r V"]:
    """The read of one token over several stores of rows and the null sink, in float32."""
    logits = [
        jnp.where(mask, _dot("bhrk,bhrxk->bhrx", query, store), -jnp.inf)
        for store, mask in zip(keys, allowed, strict=True)
    ]
    sink = jnp.broadcast_to(sink_logit.astype(jnp.float32)[..., None], (*query.shape[:-1], 1))
    weights = jax.nn.softmax(jnp.concatenate([*logits, sink], axis=-1), axis=-1)
    out, start = jnp.zeros((), jnp.float32), 0
    for store in values:
        stop = start + store.shape[-2]
        out, start = out + _dot("bhrx,bhrxv->bhrv", weights[..., start:stop], store), stop
    return out
