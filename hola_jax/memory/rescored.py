"""The cache of blocks that are ranked one after the other, each by what the one before left.

Where a score changes while a pair is held, or the choice looks at more than scores (`choice`), the best W of two runs no
longer come from the best W of each: what a block drops may have been worth keeping later. As in `exact_cache`, ranking
names rows by place alone and no gradient flows through it; the read comes after, for all blocks.

"attention" (H2O) scores a pair by the softmax weights that reads have given it so far. So the scan over blocks makes each
block's logits once for the choice, and the read makes them again: one product of queries and keys more.

"recall" (LoLA's self-recall error, by HOLA's state) scores a pair by |S' k^ - v|: how wrong S, as it is after the block,
gives its value back. Here every pair is written to S, held by the cache or not; `eviction` has the other way.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Float, Int32
from hola_jax.memory.align import Piece
from hola_jax.memory.by_xla import Kept, heads_apart, kept_rows, read_masks, read_rows
from hola_jax.memory.cache_read import mass_received
from hola_jax.memory.choice import best_of
from hola_jax.memory.exact_cache import Rows
from hola_jax.memory.norms import of_state
from hola_jax.memory.state import CacheParams, MemoryConfig, MemoryState


class Cache(NamedTuple):
    """What a block finds."""

    rows: Rows
    positions: Int32[Array, "B H W"]
    keys: Float[Array, "B H W K"]
    values: Float[Array, "B H W V"]


class Block(NamedTuple):
    """The tokens of one block, or of all stacked over blocks."""

    queries: Float[Array, "B C H K"]
    keys: Float[Array, "B C h K"]
    values: Float[Array, "B C H V"]
    own: Int32[Array, "B C"]
    documents: Int32[Array, "B C"]
    scores: Float[Array, "B C H"]  # those that the piece finds with the running block
    positions: Int32[Array, "B C"]
    places: Int32[Array, "B C"]


class Ranked(NamedTuple):
    """The choice of a piece of n blocks."""

    rows: Rows  # what each block finds, and last what comes after all of them: n + 1
    scores_now: Float[Array, "n B H W"]  # of the same rows, after the piece's tokens in the block; n + 1
    of_tokens: Float[Array, "B H L"]  # the score of each token at the end of its block, or of the piece


def read_blocks(
    fresh: bool,
    piece: Piece,
    scores: Float[Array, "B H L"],
    positions: Int32[Array, "B L"],
    whole: Int32[Array, " B"],
    params: CacheParams,
    config: MemoryConfig,
    state: MemoryState,
    states: Float[Array, "n B H K V"] | None,
) -> tuple[Float[Array, "B L H V"], Kept, Float[Array, "B H L"]]:
    """As `by_xla.read_blocks`; and the scores of the tokens, which the running block keeps. "recall" takes the `states`
    after each block."""
    still = lax.stop_gradient((piece.queries, piece.keys, piece.values, scores, params, state))
    queries, keys, values, given, learned, before = still
    fixed = piece._replace(queries=queries, keys=keys, values=values)
    ranked = rank(fixed, given, positions, learned, config, before, states)
    out = read_rows(piece, scores, ranked.rows, params, config, state, fresh)
    now = ranked.rows._replace(scores=ranked.scores_now)
    return out, kept_rows(piece, now, positions, whole, config, state, fresh), ranked.of_tokens


def rank(
    piece: Piece,
    scores: Float[Array, "B H L"],
    positions: Int32[Array, "B L"],
    params: CacheParams,
    config: MemoryConfig,
    state: MemoryState,
    states: Float[Array, "n B H K V"] | None,
) -> Ranked:
    """The rows that each block finds, and what they are worth."""
    batch, length, heads = piece.queries.shape[:3]
    blocks, found = blocks_of(piece, scores, positions, config), cache_of(state)

    def merged(cache: Cache, block: Block, of_cache: Array, of_block: Array) -> Cache:
        return best(candidates(cache, block, of_cache, of_block), config)[0]

    def step(cache: Cache, given: tuple[Block, Array | None]) -> tuple[Cache, tuple[Rows, Array, Array]]:
        block, after = given
        now = cache.rows.scores, block.scores.swapaxes(1, 2)
        if config.read_weight:
            added = _attention(cache, block, params, piece.several)
            now = now[0] + config.read_weight * added[0], now[1] + config.read_weight * added[1]
        anew = now if after is None else recall_scores(after, cache, block, params, config)
        return merged(cache, block, *anew), (cache.rows, *now)

    last, (before, now, of_tokens) = lax.scan(step, found, (blocks, states))
    return Ranked(
        Rows(*(jnp.concatenate([a, b[None]]) for a, b in zip(before, last.rows, strict=True))),
        jnp.concatenate([now, last.rows.scores[None]]),
        of_tokens.transpose(1, 2, 0, 3).reshape(batch, heads, length),
    )


def blocks_of(
    piece: Piece, scores: Float[Array, "B H L"], positions: Int32[Array, "B L"], config: MemoryConfig
) -> Block:
    """The blocks of a piece, stacked."""
    batch, length = positions.shape

    def by_block(x: Array) -> Array:
        return x.reshape(batch, length // config.block, config.block, *x.shape[2:]).swapaxes(0, 1)

    places = jnp.broadcast_to(config.window + jnp.arange(length, dtype=jnp.int32), (batch, length))
    tokens = (
        piece.queries,
        piece.keys,
        piece.values,
        piece.own,
        piece.documents,
        scores.swapaxes(1, 2),
        positions,
        places,
    )
    return Block(*map(by_block, tokens))


def cache_of(state: MemoryState) -> Cache:
    """What the first block of a piece finds."""
    places = jnp.broadcast_to(jnp.arange(state.cache_scores.shape[-1], dtype=jnp.int32), state.cache_scores.shape)
    rows = Rows(state.document, state.cache_scores, places)
    return Cache(rows, state.cache_positions, state.cache_keys, state.cache_values)


def _attention(
    cache: Cache, block: Block, params: CacheParams, several: bool
) -> tuple[Float[Array, "B H W"], Float[Array, "B H C"]]:
    """The softmax weights that the block's reads give the cache's rows and the block's tokens."""
    batch, tokens, heads, width = block.queries.shape
    key_heads, filled = block.keys.shape[2], cache.rows.scores > -jnp.inf
    masks = read_masks(filled, cache.rows.document, block.documents if several else None, key_heads)
    queries = block.queries.reshape(batch, tokens, key_heads, heads // key_heads, width)
    sink = params.sink_logit.reshape(key_heads, heads // key_heads)
    keys = (heads_apart(cache.keys, key_heads), block.keys[:, :, :, None])
    added = mass_received(queries, *keys, sink, masks, block.own > 0)
    of_cache, of_block = (x.reshape(batch, heads, -1) for x in added)
    return of_cache, of_block


def recall_error(
    state: Float[Array, "B H K V"],
    keys: Float[Array, "B H X K"],
    values: Float[Array, "B H X V"],
    params: CacheParams,
    config: MemoryConfig,
) -> Float[Array, "B H X"]:
    """|S' k^ - v| of stored pairs; 0 for a head whose S is not finite."""
    found = jnp.einsum("bhxk,bhkv->bhxv", of_state(keys, params, config), state, precision=lax.Precision.HIGHEST)
    error = jnp.linalg.norm(found - values.astype(jnp.float32), axis=-1)
    return jnp.where(jnp.isfinite(error), error, 0.0)


def recall_scores(
    state: Float[Array, "B H K V"], cache: Cache, block: Block, params: CacheParams, config: MemoryConfig
) -> tuple[Float[Array, "B H W"], Float[Array, "B H C"]]:
    """How wrong the state after the block recalls the cache's rows and the block's tokens."""
    error = lax.stop_gradient(recall_error(state, *_pairs(cache, block), params, config))
    of_cache, of_block = error[..., : cache.keys.shape[2]], error[..., cache.keys.shape[2] :]
    return jnp.where(cache.rows.scores > -jnp.inf, of_cache, -jnp.inf), of_block


def _pairs(cache: Cache, block: Block) -> tuple[Float[Array, "B H X K"], Float[Array, "B H X V"]]:
    """Keys and values of the cache's rows and of the block's tokens behind them."""
    group = block.values.shape[2] // block.keys.shape[2]
    of_tokens = jnp.repeat(block.keys.swapaxes(1, 2), group, axis=1)
    keys = jnp.concatenate([cache.keys, of_tokens], axis=2)
    return keys, jnp.concatenate([cache.values, block.values.swapaxes(1, 2)], axis=2)


class Candidates(NamedTuple):
    """The rows of a cache, and behind them the tokens of a block."""

    document: Int32[Array, " B"]  # that of the block's end
    scores: Float[Array, "B H X"]  # -inf where a pair does not compete
    positions: Int32[Array, "B H X"]
    places: Int32[Array, "B H X"]
    keys: Float[Array, "B H X K"]
    values: Float[Array, "B H X V"]


def candidates(
    cache: Cache, block: Block, of_cache: Float[Array, "B H W"], of_block: Float[Array, "B H C"]
) -> Candidates:
    """The pairs that compete for the cache; those of a document that ended do no more."""
    heads = of_cache.shape[1]
    document = jnp.maximum(cache.rows.document, jnp.max(block.documents, axis=1))
    of_cache = jnp.where((cache.rows.document == document)[:, None, None], of_cache, -jnp.inf)
    competes = (block.documents == document[:, None]) & (block.documents > 0)
    scores = jnp.concatenate([of_cache, jnp.where(competes[:, None], of_block, -jnp.inf)], axis=-1)

    def joined(rows: Array, tokens: Int32[Array, "B C"]) -> Array:
        tokens = jnp.broadcast_to(tokens[:, None], (tokens.shape[0], heads, tokens.shape[1]))
        return jnp.concatenate([rows, tokens], axis=-1)

    positions, places = joined(cache.positions, block.positions), joined(cache.rows.places, block.places)
    return Candidates(document, scores, positions, places, *_pairs(cache, block))


def best(found: Candidates, config: MemoryConfig) -> tuple[Cache, Int32[Array, "B H W"]]:
    """The rows that stay, and which of the candidates they are."""
    scores, index = best_of(config, found.scores, found.positions, found.keys)
    take = jax.vmap(jax.vmap(lambda rows, at: rows[at]))
    rows = Rows(found.document, scores, jnp.take_along_axis(found.places, index, axis=-1))
    positions = jnp.take_along_axis(found.positions, index, axis=-1)
    return Cache(rows, positions, take(found.keys, index), take(found.values, index)), index
