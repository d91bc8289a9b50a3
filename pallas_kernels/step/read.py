"""The read of one token, and the values that it needs.

A weight is known before any value is. So where the read drops entries, tiles of values of which it keeps nothing are never
brought to the chip; the others come while the state is at work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cache.arrays import Rows
from pallas_kernels.cache.energy import without_dropped_of_one
from pallas_kernels.cache.tiles import NT, dot, index


class Weights(NamedTuple):
    """Of the read, not yet divided by their sum."""

    cache: Array  # [1, W]
    block: Array  # [1, C]
    sink: Array  # [1, 1]


def weigh(
    query: Array, key: Array, block_keys: Any, cache: Rows, seen: Array, here: Array, sink: Any, energy: float | None
) -> Weights:
    """Of the cache, the block, the token itself at the place `here`, and the sink."""
    of_cache = jnp.where(cache.scores[...] > -jnp.inf, dot(query, cache.keys[...], NT), -jnp.inf)
    own = jnp.sum(query.astype(jnp.float32) * key.astype(jnp.float32), axis=1, keepdims=True)
    of_block = jnp.where(seen, jnp.where(here, own, dot(query, block_keys[...], NT)), -jnp.inf)
    top = jnp.maximum(jnp.max(of_cache, axis=1, keepdims=True), jnp.max(of_block, axis=1, keepdims=True))
    top = jnp.maximum(top, sink)
    weights = Weights(*(jnp.exp(x - top) for x in (of_cache, of_block, sink)))
    return weights if energy is None else Weights(*without_dropped_of_one(list(weights), energy))


def read_of(weights: Weights, value: Array, cache: Rows, block_values: Any, here: Array) -> Array:
    """The read [1, V]; that of the token itself is not yet in the block."""
    total = jnp.sum(weights.cache, axis=1, keepdims=True) + jnp.sum(weights.block, axis=1, keepdims=True) + weights.sink
    of_token = jnp.sum(jnp.where(here, weights.block, 0.0), axis=1, keepdims=True)
    read = dot(weights.cache.astype(value.dtype), cache.values[...]) + of_token * value.astype(jnp.float32)
    read = read + dot(jnp.where(here, 0.0, weights.block).astype(value.dtype), block_values[...])
    return read / total


def fetch(weights: Array, rows: Any, room: Any, tile: int, everything: Any, done: Any) -> list[Callable[[], None]]:
    """Starts to bring to `room` the tiles of `rows` that a weight [1, X] is on, or everything. The others become zeros: what
    the chip held there may be NaN. What comes back waits for the tiles."""
    place = index((1, weights.shape[1]), 1)
    waits: list[Callable[[], None]] = []
    for first in range(0, weights.shape[1], tile):
        inside, tokens = (place >= first) & (place < first + tile), pl.ds(first, tile)
        wanted = everything | (jnp.max(jnp.where(inside, weights, 0.0)) > 0)
        copy = pltpu.make_async_copy(rows.at[tokens], room.at[tokens], done)
        pl.when(wanted)(copy.start)
        waits.append(functools.partial(pl.when(wanted), copy.wait))

        @pl.when(~wanted)
        def _(tokens: Any = tokens) -> None:
            room[tokens, :] = jnp.zeros((tile, room.shape[1]), room.dtype)

    return waits
