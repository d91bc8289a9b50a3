"""What a device must know of the devices before it when a sequence is sharded along a mesh axis (inside shard_map).

Each sends one element of each monoid: counters, and the best W rows of its tokens with their keys and values. The state S
travels in `delta_rule`. Nothing that travels grows with the number of tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Int32
from hola_jax.memory.align import Piece, gather_rows
from hola_jax.memory.exact_cache import Rows, merge, run_rows
from hola_jax.memory.scan import axis_scan, prefix_scan
from hola_jax.memory.state import EMPTY, MemoryState


def counters_before_device(own: Array, count: Array, state: MemoryState, axis: str) -> MemoryState:
    """`state` with the position and the document that this device's first token finds."""
    last = jnp.max(own, axis=1)
    of_last = jnp.sum((own == last[:, None]) & (own > 0), axis=1, dtype=jnp.int32)

    def act(element: tuple[Array, ...], state: tuple[Array, ...]) -> tuple[Array, ...]:
        (last, of_last, count), (document, start, position) = element, state
        start = jnp.where(last > document, position + count - of_last, start)
        return jnp.maximum(last, document), start, position + count

    counters = (state.document, state.document_start, state.position)
    document, start, position = axis_scan(act, (last, of_last, count), counters, axis)[0]
    return dataclasses.replace(state, document=document, document_start=start, position=position)


def cache_before_device(
    piece: Piece, scores: Array, positions: Array, state: MemoryState, document: Int32[Array, " B"], axis: str
) -> MemoryState:
    """`state` with the cache that this device's first block finds: each device sends the W best rows of its tokens.
    `document` is that of the cache in `state`, which the first device finds; `state.document` is this device's."""
    window = state.cache_scores.shape[-1]
    own = run_rows(scores, piece.documents, jnp.asarray(window), window)
    filled = own.scores > -jnp.inf
    keys, values = (x[0] for x in gather_rows(piece, own.places[None], filled[None], state, True))
    at = jnp.take_along_axis(
        jnp.broadcast_to(positions[:, None], scores.shape), jnp.maximum(own.places - window, 0), axis=-1
    )
    sent = lax.all_gather((own.document, own.scores, at, keys, values), axis)
    documents, all_scores, all_positions, all_keys, all_values = sent
    devices = documents.shape[0]
    # Rows are named by their place among [incoming cache | device 0's rows | device 1's rows | ...].
    names = jnp.arange((devices + 1) * window, dtype=jnp.int32).reshape(devices + 1, 1, 1, window)
    names = jnp.broadcast_to(names, (devices + 1, *scores.shape[:2], window))
    elements = Rows(documents, all_scores, names[1:])
    start = Rows(document, state.cache_scores, names[0])
    before, _ = prefix_scan(lambda element, rows: merge(rows, element), merge, elements, start, "sequential")
    mine = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, lax.axis_index(axis), keepdims=False), before)
    take = jax.vmap(jax.vmap(lambda x, i: x[i]))

    def named(initial: Array, gathered: Array) -> Array:
        """The rows that `mine` names."""
        gathered = jnp.moveaxis(gathered, 0, 2)  # [B H devices W ..]
        gathered = gathered.reshape(*gathered.shape[:2], devices * window, *gathered.shape[4:])
        return take(jnp.concatenate([initial, gathered], axis=2), mine.places)

    alive = mine.scores > -jnp.inf
    return dataclasses.replace(
        state,
        cache_keys=jnp.where(alive[..., None], named(state.cache_keys, all_keys), 0),
        cache_values=jnp.where(alive[..., None], named(state.cache_values, all_values), 0),
        cache_scores=mine.scores,
        cache_positions=jnp.where(alive, named(state.cache_positions, all_positions), EMPTY),
    )


def last_device_with_tokens(state: MemoryState, count: Int32[Array, " B"], axis: str) -> MemoryState:
    """The state after the whole sequence, on every device: that of the last device that holds a real token of the row.
    Fast weights are the whole sequence's already."""
    index = lax.axis_index(axis)
    holder = lax.pmax(jnp.where(count > 0, index, 0), axis)

    def from_holder(x: Array) -> Array:
        mine = (holder == index).reshape(-1, *[1] * (x.ndim - 1))
        return lax.psum(jnp.where(mine, x, jnp.zeros_like(x)), axis)

    return dataclasses.replace(jax.tree.map(from_holder, state), fast_weights=state.fast_weights)
