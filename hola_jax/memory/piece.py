"""Many tokens at once: the chunked path of HOLA's memory.

Three phases: tokens are lined up with the blocks (`align`), the state path gives outputs and scores (`delta_rule`), and
the scores decide what each block finds in the cache, which is then read (`exact_cache`, `cache_read`). Along a mesh axis
the same phases run on each device's part, and `devices` tells what a part must know of those before it.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Float, Int32
from hola_jax.memory.align import Inputs, Piece, align, gather_rows, to_places, to_tokens
from hola_jax.memory.cache_read import Masks, Visible, read_visible
from hola_jax.memory.delta_rule import DeltaRuleResult, choose_scan, delta_rule
from hola_jax.memory.devices import cache_before_device, counters_before_device, last_device_with_tokens
from hola_jax.memory.exact_cache import Rows, cache_of_blocks, magnitude_kind, token_scores
from hola_jax.memory.norms import for_reading, unit_l2
from hola_jax.memory.state import EMPTY, CacheParams, MemoryConfig, MemoryState
from hola_jax.memory.validate import Implementation
from pallas_kernels import delta_rule as kernel
from pallas_kernels.cache import Cache, cached_read


def run_piece(
    inputs: Inputs,
    params: CacheParams,
    config: MemoryConfig,
    documents: Array,
    several: bool,
    state: MemoryState,
    fresh: bool,
    axis: str | None,
    implementation: Implementation = "xla",
) -> tuple[Array, MemoryState]:
    """Any number of tokens at once."""
    length = documents.shape[1]
    fill = state.position % config.block
    if axis is not None or (fresh and not several):  # the tokens stand at their places already
        tail = -length % config.block
        padded = Inputs(*(jnp.pad(x, [(0, 0), (0, tail)] + [(0, 0)] * (x.ndim - 2)) for x in inputs))
        documents = jnp.pad(documents, [(0, 0), (0, tail)])
        piece = _line_up(padded, documents, several or not fresh, params, state, config, fill)
        out, state = _phases(piece, params, config, state, fresh, axis, implementation)
        return out[:, :length], state
    alignment = align(documents, fill, config.block, may_be_filled=not fresh)
    moved = Inputs(*(to_places(x, alignment) for x in inputs))
    places = to_places(documents[..., None], alignment)[..., 0]
    piece = _line_up(moved, places, True, params, state, config, fill)
    out, state = _phases(piece, params, config, state, fresh, None, implementation)
    return to_tokens(out, alignment), state


def _line_up(
    inputs: Inputs,
    documents: Array,
    several: bool,
    params: CacheParams,
    state: MemoryState,
    config: MemoryConfig,
    fill: Array,
) -> Piece:
    """A piece whose tokens already stand at their places, behind `fill` places of the running block."""
    length = documents.shape[1]
    queries, keys = for_reading(inputs.q, inputs.k, inputs.v.shape[2], params, config)
    values, own = inputs.v, documents
    if several:
        place = jnp.arange(length, dtype=jnp.int32)
        occupied = place < fill[:, None]
        tail = [(0, 0), (0, length - config.block), (0, 0), (0, 0)]
        running_keys, running_values = (jnp.pad(x.swapaxes(1, 2), tail) for x in (state.block_keys, state.block_values))
        keys = jnp.where(occupied[..., None, None], running_keys, keys)
        values = jnp.where(occupied[..., None, None], running_values, values)
        alive = (state.position - fill)[:, None] + place >= state.document_start[:, None]
        documents = jnp.where(occupied, jnp.where(alive, state.document[:, None], 0), documents)
    return Piece(inputs, queries, keys, values, own, documents, several)


def _phases(
    piece: Piece,
    params: CacheParams,
    config: MemoryConfig,
    state: MemoryState,
    fresh: bool,
    axis: str | None,
    implementation: Implementation,
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
    by_kernel, interpret = implementation != "xla", implementation == "interpret"
    initial = None if fresh and axis is None else state.fast_weights
    state_path = partial(_state_by_kernel, interpret) if by_kernel else partial(_state_by_xla, axis)
    state_out = state_path(piece, config, initial, before_device.document)
    positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)
    scores = token_scores(config, state_out.magnitude, inputs.v, inputs.beta, positions).swapaxes(1, 2)
    if not fresh and axis is None:
        occupied = jnp.arange(length) < (state.position % block)[:, None]
        running = jnp.pad(state.block_scores, [(0, 0), (0, 0), (0, length - block)])
        scores = jnp.where(occupied[:, None], running, scores)
    if axis is not None:
        before_device = cache_before_device(piece, scores, positions, before_device, axis)
        fresh = False
    whole = (before_device.position + count - start) // block  # complete blocks of the piece, per row
    read = partial(_read_by_kernel, interpret) if by_kernel else _read_blocks
    o_cache, kept = read(piece, scores, positions, whole, params, config, before_device, fresh)
    gate = jax.nn.sigmoid(params.gate_logit.astype(jnp.float32))[:, None]
    out = (state_out.out + gate * o_cache).astype(inputs.v.dtype)
    after = _state_after(piece, scores, positions, kept, whole, count, config, before_device)
    after = dataclasses.replace(after, fast_weights=state_out.final)
    return out, (after if axis is None else last_device_with_tokens(after, count, axis))


def _state_by_xla(
    axis: str | None, piece: Piece, config: MemoryConfig, initial: Array | None, document: Int32[Array, " B"]
) -> DeltaRuleResult:
    """Outputs, magnitudes and the last state of the state path."""
    q, k, v, beta, log_decay = piece.inputs
    return delta_rule(
        unit_l2(q),
        unit_l2(k),
        v,
        beta,
        log_decay,
        scale=config.scale(k.shape[-1]),
        chunk=config.chunk,
        scan=config.scan,
        documents=piece.own if piece.several else None,
        initial=initial,
        initial_document=document,
        magnitude=magnitude_kind(config),
        sequence_axis=axis,
    )


def _state_by_kernel(
    interpret: bool, piece: Piece, config: MemoryConfig, initial: Array | None, document: Int32[Array, " B"]
) -> DeltaRuleResult:
    """The same by the Pallas kernel, in chunks of its own."""
    q, k, v, beta, log_decay = piece.inputs
    found = kernel.delta_rule(
        q,
        k,
        v,
        beta.astype(jnp.float32),
        log_decay.astype(jnp.float32),
        scale=config.scale(k.shape[-1]),
        normalise=True,
        documents=piece.own if piece.several else None,
        initial=initial,
        initial_document=document,
        magnitude=magnitude_kind(config),
        out_dtype=jnp.float32,
        interpret=interpret,
    )
    return DeltaRuleResult(found.out, found.magnitude, found.final)


def heads_apart(x: Array, key_heads: int) -> Array:
    """[.., H, X, Y] -> [.., h, r, X, Y]."""
    return x.reshape(*x.shape[:-3], key_heads, x.shape[-3] // key_heads, *x.shape[-2:])


class Kept(NamedTuple):
    """The cache after the last complete block of each row."""

    keys: Float[Array, "B H W K"]
    values: Float[Array, "B H W V"]
    scores: Float[Array, "B H W"]
    positions: Int32[Array, "B H W"]
    document: Int32[Array, " B"]


def _read_by_kernel(
    interpret: bool,
    piece: Piece,
    scores: Float[Array, "B H L"],
    positions: Int32[Array, "B L"],
    whole: Int32[Array, " B"],
    params: CacheParams,
    config: MemoryConfig,
    state: MemoryState,
    fresh: bool,
) -> tuple[Float[Array, "B L H V"], Kept]:
    """As `_read_blocks`, by the Pallas kernel that merges and reads in one."""
    document = state.document if piece.several else jnp.max(piece.documents, axis=1)
    found = (state.cache_keys, state.cache_values, state.cache_scores, state.cache_positions, document)
    out, after, _ = cached_read(
        piece.queries,
        piece.keys,
        piece.values,
        scores,
        params.sink_logit,
        Cache(*found),
        documents=piece.documents if piece.several else None,
        start=positions[:, 0],
        whole=whole,
        window=config.window,
        block=config.block,
        out_dtype=jnp.float32,
        interpret=interpret,
    )
    return out, Kept(*after)


def _read_blocks(
    piece: Piece,
    scores: Float[Array, "B H L"],
    positions: Int32[Array, "B L"],
    whole: Int32[Array, " B"],
    params: CacheParams,
    config: MemoryConfig,
    state: MemoryState,
    fresh: bool,
) -> tuple[Float[Array, "B L H V"], Kept]:
    """The cache read of every place, float32, and the cache that the piece leaves."""
    places_before = jnp.broadcast_to(jnp.arange(config.window, dtype=jnp.int32), state.cache_scores.shape)
    initial = Rows(state.document, state.cache_scores, places_before)
    rows = cache_of_blocks(scores, piece.documents, initial, config.block, choose_scan(config.scan))
    out = _read_rows(piece, rows, params, config, state, fresh)
    return out, _kept(piece, rows, positions, whole, config, state, fresh)


def _read_rows(
    piece: Piece, rows: Rows, params: CacheParams, config: MemoryConfig, state: MemoryState, fresh: bool
) -> Float[Array, "B L H V"]:
    """The cache read of every place, float32; `rows` are what each block finds."""
    batch, length, heads = piece.queries.shape[:3]
    key_heads, block = piece.keys.shape[2], config.block
    blocks = length // block
    places, filled = rows.places[:-1], rows.scores[:-1] > -jnp.inf
    cache_keys, cache_values = gather_rows(piece, places, filled, state, fresh)

    def by_block(x: Array) -> Array:
        """[B, L, H, X] -> [n, B, C, h, H / h, X]."""
        return x.reshape(batch, blocks, block, key_heads, x.shape[2] // key_heads, x.shape[3]).swapaxes(0, 1)

    masks = Masks(heads_apart(filled[..., None], key_heads), None, None)
    if piece.several:
        documents = piece.documents.reshape(batch, blocks, block).transpose(1, 0, 2)[:, :, None, None]
        same = (documents[..., :, None] == documents[..., None, :]) & (documents > 0)[..., None]
        of_cache = (documents == rows.document[:-1, :, None, None, None])[..., None, :]
        masks = masks._replace(cache=of_cache, block=same)
    visible = Visible(
        heads_apart(cache_keys, key_heads),
        heads_apart(cache_values, key_heads),
        by_block(piece.keys),
        by_block(piece.values),
        params.sink_logit.reshape(key_heads, heads // key_heads),
    )
    out = read_visible(by_block(piece.queries), visible, masks)
    return out.swapaxes(0, 1).reshape(batch, length, heads, out.shape[-1])


def _kept(
    piece: Piece,
    rows: Rows,
    positions: Int32[Array, "B L"],
    whole: Int32[Array, " B"],
    config: MemoryConfig,
    state: MemoryState,
    fresh: bool,
) -> Kept:
    """What `rows` name after the complete blocks."""
    last = Rows(*(x[whole, jnp.arange(whole.shape[0])] for x in rows))
    alive = last.scores > -jnp.inf
    keys, values = (x[0] for x in gather_rows(piece, last.places[None], alive[None], state, fresh))
    window = config.window
    token_positions = positions[:, 0, None, None] + last.places - window
    if not fresh and window:
        old = jnp.take_along_axis(state.cache_positions, jnp.minimum(last.places, window - 1), axis=-1)
        token_positions = jnp.where(last.places < window, old, token_positions)
    return Kept(keys, values, last.scores, token_positions, last.document)


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
        position=position,
        document=document,
        document_start=start,
    )
