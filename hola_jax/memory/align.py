"""Blocks stand at absolute positions, counted in real tokens: this moves tokens so that every row's blocks line up.

A row's tokens are moved to stand behind those that its running block already holds, without the padding between them.
The result is T + C - 1 long at most, whatever the rows' positions are, so shapes stay static.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hola_jax.array_types import Array, Float, Int, Int32
from hola_jax.memory.state import MemoryState


class Inputs(NamedTuple):
    """The tokens of a piece, as they come or lined up with the blocks."""

    q: Float[Array, "B T h K"]
    k: Float[Array, "B T h K"]
    v: Float[Array, "B T H V"]
    beta: Float[Array, "B T H"]
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"]


class Piece(NamedTuple):
    """Tokens lined up with the blocks: L is a multiple of C and place 0 begins a block."""

    inputs: Inputs  # zero at places without a token of this piece; NaN only where a fused kernel takes it
    queries: Float[Array, "B L H K"]  # q~ with the read's temperature
    keys: Float[Array, "B L h K"]  # k~ as stored, the running block's in front
    values: Float[Array, "B L H V"]
    own: Int32[Array, "B L"]  # document of this piece's tokens, 0 elsewhere
    documents: Int32[Array, "B L"]  # ... and of the running block's tokens that are still visible
    several: bool  # whether places may differ in document
    learned: Float[Array, "B L H"] | None = None  # scores that the layer gave
    betas: Float[Array, "B L H"] | None = None  # where pairs are written late, the running block's in front


class Alignment(NamedTuple):
    """Where the tokens go and where they came from; -1 for nowhere."""

    place_of_token: Int32[Array, "B T"]
    token_at_place: Int32[Array, "B L"]


def align(documents: Int[Array, "B T"], fill: Int32[Array, " B"], block: int, may_be_filled: bool) -> Alignment:
    """Behind `fill` occupied places, the real tokens in their order; whole blocks."""
    batch, tokens = documents.shape
    length = tokens + (block - 1 if may_be_filled else 0)
    length = max(block, -(-length // block) * block)
    real = documents > 0
    rank = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    place = jnp.where(real, fill[:, None] + rank - 1, length)
    token = jnp.full((batch, length), -1, jnp.int32)
    token = token.at[jnp.arange(batch)[:, None], place].set(jnp.arange(tokens, dtype=jnp.int32), mode="drop")
    return Alignment(jnp.where(real, place, -1), token)


@jax.custom_vjp
def move(x: Array, source: Int32[Array, "B L"], target: Int32[Array, "B T"]) -> Array:
    """[B, T, ...] -> [B, L, ...]: place p gets token source[p], or zero. `target` is the inverse; it makes the gradient
    a gather too, where XLA would scatter."""
    rows = jax.vmap(lambda row, index: row.at[index].get(mode="clip"))(x, source)
    return jnp.where((source >= 0).reshape(*source.shape, *[1] * (x.ndim - 2)), rows, 0)


def _move_forward(x: Array, source: Array, target: Array) -> tuple[Array, tuple[Array, Array]]:
    return move(x, source, target), (source, target)


def _move_backward(saved: tuple[Array, Array], d_out: Array) -> tuple[Array, None, None]:
    source, target = saved
    return move(d_out, target, source), None, None


move.defvjp(_move_forward, _move_backward)


def to_places(x: Array, alignment: Alignment) -> Array:
    return move(x, alignment.token_at_place, alignment.place_of_token)


def to_tokens(x: Array, alignment: Alignment) -> Array:
    return move(x, alignment.place_of_token, alignment.token_at_place)


def behind_running_block(
    keys: Float[Array, "B L h K"],
    values: Float[Array, "B L H V"],
    documents: Int32[Array, "B L"],
    state: Any,
    fill: Int32[Array, " B"],
) -> tuple[Float[Array, "B L h K"], Float[Array, "B L H V"], Int32[Array, "B L"]]:
    """The pairs of the running block in the `fill` places in front, and their documents: 0 where nobody sees them again.
    `state` is that of any memory with a running block."""
    length = documents.shape[1]
    place = jnp.arange(length, dtype=jnp.int32)
    occupied = place < fill[:, None]
    tail = [(0, 0), (0, length - state.block_keys.shape[2]), (0, 0), (0, 0)]
    running_keys, running_values = (jnp.pad(x.swapaxes(1, 2), tail) for x in (state.block_keys, state.block_values))
    alive = (state.position - fill)[:, None] + place >= state.document_start[:, None]
    return (
        jnp.where(occupied[..., None, None], running_keys, keys),
        jnp.where(occupied[..., None, None], running_values, values),
        jnp.where(occupied, jnp.where(alive, state.document[:, None], 0), documents),
    )


def gather_rows(
    piece: Piece, places: Int32[Array, "n B H W"], filled: Array, state: MemoryState, fresh: bool
) -> tuple[Array, Array]:
    """Keys and values [n, B, H, W, ...] of cache rows named by place: the incoming cache's W first, then the tokens."""
    window, key_heads = state.cache_scores.shape[-1], piece.keys.shape[2]
    group = state.cache_scores.shape[1] // key_heads
    by_head = jnp.repeat(piece.keys.swapaxes(1, 2), group, axis=1), piece.values.swapaxes(1, 2)
    take = jax.vmap(jax.vmap(lambda rows, index: rows.at[index].get(mode="clip")))
    gathered = []
    for tokens, cached in zip(by_head, (state.cache_keys, state.cache_values), strict=True):
        rows = jax.vmap(lambda index, tokens=tokens: take(tokens, index))(places - window)
        if not fresh:
            old = jax.vmap(lambda index, cached=cached: take(cached, index))(places) if window else rows
            rows = jnp.where((places < window)[..., None], old, rows)
        gathered.append(jnp.where(filled[..., None], rows, 0))
    return gathered[0], gathered[1]
