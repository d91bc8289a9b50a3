"""Many tokens at once: the chunked path of HOLA's memory.

Three phases: tokens are lined up with the blocks (`align`), the state path gives outputs and scores, and the scores
decide what each block finds in the cache, which is then read. The last two are in `by_xla` and in `by_kernels`; where scores
change while a pair is held, the last is in `rescored`; where pairs are written late, both are in `eviction`.
Along a mesh axis the same phases run on each device's part, and `devices` tells what a part must know of those before it.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Float, Int32
from hola_jax.memory import by_kernels, by_xla, eviction, poison, rescored
from hola_jax.memory.align import Inputs, Piece, align, behind_running_block, to_places, to_tokens
from hola_jax.memory.by_xla import Kept
from hola_jax.memory.devices import cache_before_device, counters_before_device, last_device_with_tokens
from hola_jax.memory.exact_cache import token_scores
from hola_jax.memory.kernels import Kernels
from hola_jax.memory.learned import retained
from hola_jax.memory.norms import for_reading
from hola_jax.memory.state import EMPTY, CacheParams, MemoryConfig, MemoryState


def run_piece(
    inputs: Inputs,
    params: CacheParams,
    config: MemoryConfig,
    documents: Array,
    several: bool,
    state: MemoryState,
    fresh: bool,
    axis: str | None,
    kernels: Kernels | None = None,
    learned: Float[Array, "B T H"] | None = None,
) -> tuple[Array, MemoryState]:
    """Any number of tokens at once; by plain XLA where no kernels are given. NaN may come to a fused kernel alone."""
    length = documents.shape[1]
    fill = state.position % config.block
    if axis is not None or (fresh and not several):  # the tokens stand at their places already
        tail = -length % config.block
        padded = Inputs(*(jnp.pad(x, [(0, 0), (0, tail)] + [(0, 0)] * (x.ndim - 2)) for x in inputs))
        documents = jnp.pad(documents, [(0, 0), (0, tail)])
        learned = None if learned is None else jnp.pad(learned, [(0, 0), (0, tail), (0, 0)])
        piece = _line_up(padded, documents, several or not fresh, params, state, config, fill, kernels, learned)
        out, state = _phases(piece, params, config, state, fresh, axis, kernels)
        return out[:, :length], state
    alignment = align(documents, fill, config.block, may_be_filled=not fresh)
    moved = Inputs(*(to_places(x, alignment) for x in inputs))
    places = to_places(documents[..., None], alignment)[..., 0]
    learned = None if learned is None else to_places(learned, alignment)
    piece = _line_up(moved, places, True, params, state, config, fill, kernels, learned)
    out, state = _phases(piece, params, config, state, fresh, None, kernels)
    return to_tokens(out, alignment), state


def _line_up(
    inputs: Inputs,
    documents: Array,
    several: bool,
    params: CacheParams,
    state: MemoryState,
    config: MemoryConfig,
    fill: Array,
    kernels: Kernels | None,
    learned: Float[Array, "B L H"] | None,
) -> Piece:
    """A piece whose tokens already stand at their places, behind `fill` places of the running block."""
    q, k, values, *_ = inputs
    if kernels is not None and kernels.hola is not None:  # which takes NaN; the running block must not keep it
        q, k, values = (poison.finite_together(x)[0][0] for x in (q, k, values))
    queries, keys = for_reading(q, k, values.shape[2], params, config)
    own, betas = documents, None
    if config.write == "eviction":
        assert state.block_betas is not None
        running = jnp.pad(state.block_betas.swapaxes(1, 2), [(0, 0), (0, own.shape[1] - config.block), (0, 0)])
        occupied = jnp.arange(own.shape[1]) < fill[:, None]
        betas = jnp.where(occupied[..., None], running, inputs.beta)
    if learned is not None:
        values = retained(values, learned)
    if several:
        keys, values, documents = behind_running_block(keys, values, documents, state, fill)
    return Piece(inputs, queries, keys, values, own, documents, several, learned, betas)


def _phases(
    piece: Piece,
    params: CacheParams,
    config: MemoryConfig,
    state: MemoryState,
    fresh: bool,
    axis: str | None,
    kernels: Kernels | None,
) -> tuple[Array, MemoryState]:
    """The phases behind the alignment: (outputs at places, state after the piece)."""
    inputs, block = piece.inputs, config.block
    length = inputs.v.shape[1]
    count = jnp.sum(piece.own > 0, axis=1, dtype=jnp.int32)
    start = state.position - state.position % block  # position of place 0
    before_device = state
    if axis is not None:
        before_device = counters_before_device(piece.own, count, state, axis)
        start = before_device.position
    positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)
    if kernels is not None and kernels.hola is not None:
        whole = (state.position + count - start) // block
        out, scores, weights, kept = by_kernels.in_one(kernels, piece, positions, whole, params, config, state, fresh)
        after = _state_after(piece, scores, positions, kept, whole, count, config, state)
        return out, dataclasses.replace(after, fast_weights=weights)
    if config.write == "eviction":
        whole = (state.position + count - start) // block
        o_state, o_cache, kept, weights = eviction.run_blocks(fresh, piece, positions, whole, params, config, state)
        scores = jnp.zeros(o_state.shape[:3], jnp.float32).swapaxes(1, 2)  # made at a block's end
        after = _state_after(piece, scores, positions, kept, whole, count, config, state)
        return _gated(o_state, o_cache, piece, params), dataclasses.replace(after, fast_weights=weights)
    initial = None if fresh and axis is None else state.fast_weights
    state_path = by_xla.state_path if kernels is None else partial(by_kernels.state_path, kernels)
    state_out = state_path(piece, config, initial, before_device.document, axis)
    scores = token_scores(config, state_out.magnitude, inputs.v, inputs.beta, positions, piece.learned)
    scores = scores.swapaxes(1, 2)
    if not fresh and axis is None:
        occupied = jnp.arange(length) < (state.position % block)[:, None]
        running = jnp.pad(state.block_scores, [(0, 0), (0, 0), (0, length - block)])
        scores = jnp.where(occupied[:, None], running, scores)
    if axis is not None:
        before_device = cache_before_device(piece, scores, positions, before_device, state.document, axis)
        fresh = False
    whole = (before_device.position + count - start) // block  # complete blocks of the piece, per row
    given = (piece, scores, positions, whole, params, config, before_device)
    if config.rescored:
        o_cache, kept, scores = rescored.read_blocks(fresh, *given, state_out.states)
    elif kernels is None:
        o_cache, kept = by_xla.read_blocks(fresh, *given)
    else:
        o_cache, kept = by_kernels.read_blocks(kernels, *given)
    out = _gated(state_out.out, o_cache, piece, params)
    after = _state_after(piece, scores, positions, kept, whole, count, config, before_device)
    after = dataclasses.replace(after, fast_weights=state_out.final)
    return out, (after if axis is None else last_device_with_tokens(after, count, axis))


def _gated(
    o_state: Float[Array, "B L H V"], o_cache: Float[Array, "B L H V"], piece: Piece, params: CacheParams
) -> Float[Array, "B L H V"]:
    gate = jax.nn.sigmoid(params.gate_logit.astype(jnp.float32))[:, None]
    return (o_state + gate * o_cache).astype(piece.inputs.v.dtype)


def _state_after(
    piece: Piece,
    scores: Float[Array, "B H L"],
    positions: Int32[Array, "B L"],
    kept: Kept,
    whole: Int32[Array, " B"],
    count: Int32[Array, " B"],
    config: MemoryConfig,
    state: MemoryState,
) -> MemoryState:
    """Cache, running block and counters after `count` more tokens; the fast weights are the caller's."""
    block = config.block
    position = state.position + count
    document = jnp.maximum(state.document, jnp.max(piece.own, axis=1))
    of_document = jnp.sum((piece.own == document[:, None]) & (document > 0)[:, None], axis=1, dtype=jnp.int32)
    start = jnp.where(document == state.document, state.document_start, position - of_document)
    alive = (kept.scores > -jnp.inf) & (kept.document == document)[:, None, None]

    def running(x: Array) -> Array:
        """The block that `position` points into, of [B, H, L, ...]; zero behind it."""
        padded = jnp.pad(x, [(0, 0), (0, 0), (0, block)] + [(0, 0)] * (x.ndim - 3))
        cut = jax.vmap(lambda row, n: lax.dynamic_slice_in_dim(row, n * block, block, axis=1))(padded, whole)
        held = jnp.arange(block) < (position % block)[:, None]
        return jnp.where(held.reshape(-1, 1, block, *[1] * (x.ndim - 3)), cut, 0)

    return dataclasses.replace(
        state,
        cache_keys=jnp.where(alive[..., None], kept.keys, 0),
        cache_values=jnp.where(alive[..., None], kept.values, 0),
        cache_scores=jnp.where(alive, kept.scores, -jnp.inf),
        cache_positions=jnp.where(alive, kept.positions, EMPTY),
        block_keys=running(piece.keys.swapaxes(1, 2)),
        block_values=running(piece.values.swapaxes(1, 2)),
        block_scores=running(scores),
        cache_betas=None if kept.betas is None else jnp.where(alive, kept.betas, 0),
        block_betas=None if piece.betas is None else running(piece.betas.swapaxes(1, 2)),
        position=position,
        document=document,
        document_start=start,
    )
