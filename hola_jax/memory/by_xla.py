"""The phases of `piece` in plain XLA: the state path over chunks, what each block finds in the cache, and the read."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from hola_jax.array_types import Array, Bool, Float, Int32
from hola_jax.memory.align import Piece, gather_rows
from hola_jax.memory.cache_read import Masks, Visible, read_visible
from hola_jax.memory.delta_rule import DeltaRuleResult, choose_scan, delta_rule
from hola_jax.memory.exact_cache import Rows, cache_of_blocks, magnitude_kind
from hola_jax.memory.norms import unit_l2, with_power, with_score
from hola_jax.memory.state import CacheParams, MemoryConfig, MemoryState


def state_path(
    piece: Piece, config: MemoryConfig, initial: Array | None, document: Int32[Array, " B"], axis: str | None
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
        every=config.block if config.score == "recall" else None,
        sequence_axis=axis,
    )


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
    betas: Float[Array, "B H W"] | None = None  # where pairs are written late


def read_blocks(
    fresh: bool,
    piece: Piece,
    scores: Float[Array, "B H L"],
    positions: Int32[Array, "B L"],
    whole: Int32[Array, " B"],
    params: CacheParams,
    config: MemoryConfig,
    state: MemoryState,
) -> tuple[Float[Array, "B L H V"], Kept]:
    """The cache read of every place, float32, and the cache that the piece leaves; `fresh` where it
    finds none."""
    places_before = jnp.broadcast_to(jnp.arange(config.window, dtype=jnp.int32), state.cache_scores.shape)
    initial = Rows(state.document, state.cache_scores, places_before)
    rows = cache_of_blocks(scores, piece.documents, initial, config.block, choose_scan(config.scan))
    out = read_rows(piece, scores, rows, params, config, state, fresh)
    return out, kept_rows(piece, rows, positions, whole, config, state, fresh)


def read_masks(
    filled: Bool[Array, "*n B H W"],
    found: Int32[Array, "*n B"],
    documents: Int32[Array, "*n B C"] | None,
    key_heads: int,
) -> Masks:
    """Which rows of a block's visible set each of its tokens may see: rows of the cache that hold a token of document
    `found`, and tokens of the block. `documents` is None where there is but one."""
    held = heads_apart(filled[..., None], key_heads)
    if documents is None:
        return Masks(held, None, None)
    own = documents[..., None, None, :]
    same = (own[..., :, None] == own[..., None, :]) & (own > 0)[..., None]
    of_cache = (own == found[..., None, None, None])[..., None, :]
    return Masks(held, of_cache, same)


def read_rows(
    piece: Piece,
    scores: Float[Array, "B H L"],
    rows: Rows,
    params: CacheParams,
    config: MemoryConfig,
    state: MemoryState,
    fresh: bool,
) -> Float[Array, "B L H V"]:
    """The cache read of every place, float32; `rows` are what each block finds."""
    batch, length, heads = piece.queries.shape[:3]
    queries, keys, block = piece.queries, piece.keys, config.block
    blocks = length // block
    places, filled = rows.places[:-1], rows.scores[:-1] > -jnp.inf
    cache_keys, cache_values = gather_rows(piece, places, filled, state, fresh)

    if config.read_power:  # every head has keys of its own, for it has scores of its own
        queries = with_power(queries, params)
        keys, cache_keys = with_score(keys, scores.swapaxes(1, 2), 2), with_score(cache_keys, rows.scores[:-1], 2)
    key_heads = keys.shape[2]

    def by_block(x: Array) -> Array:
        """[B, L, H, X] -> [n, B, C, h, H / h, X]."""
        return x.reshape(batch, blocks, block, key_heads, x.shape[2] // key_heads, x.shape[3]).swapaxes(0, 1)

    documents = piece.documents.reshape(batch, blocks, block).swapaxes(0, 1) if piece.several else None
    masks = read_masks(filled, rows.document[:-1], documents, key_heads)
    visible = Visible(
        heads_apart(cache_keys, key_heads),
        heads_apart(cache_values, key_heads),
        by_block(keys),
        by_block(piece.values),
        params.sink_logit.reshape(key_heads, heads // key_heads),
    )
    out = read_visible(by_block(queries), visible, masks, config.read_energy)
    return out.swapaxes(0, 1).reshape(batch, length, heads, out.shape[-1])


def kept_rows(
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
