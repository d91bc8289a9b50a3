"""HOLA's memory where a pair is written to the state S when the cache drops it, as in LoLA, and not when it comes.

Inside a block S only decays. At the end of the block all pairs of the document that the cache or the block holds are scored
by |S' k^ - v|, the best W stay, and the others are absorbed: in the order of their positions, by the delta rule, each with
the beta that it came with and no decay between them. So a pair is in the exact memory or in S, never in both, and blocks
find S one after the other, together with what stays. Gradients flow through the pairs that S absorbs to what queries find in
it, none through the scores.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Bool, Float, Int32
from hola_jax.memory.align import Piece
from hola_jax.memory.by_xla import Kept, read_rows
from hola_jax.memory.decay import decays, document_masks
from hola_jax.memory.delta_rule import HIGHEST, delta_rule, from_chunks, to_chunks
from hola_jax.memory.exact_cache import Rows
from hola_jax.memory.norms import of_state, unit_l2
from hola_jax.memory.rescored import Block, Cache, best, blocks_of, cache_of, candidates, recall_scores
from hola_jax.memory.state import CacheParams, MemoryConfig, MemoryState, select


class Carried(NamedTuple):
    """What a block finds."""

    weights: Float[Array, "B H 1 K V"]  # S, with the axis of `delta_rule.to_chunks`
    cache: Cache
    betas: Float[Array, "B H W"]


class Steps(NamedTuple):
    """What a block does to S and finds in it; leading axis n."""

    number: Int32[Array, "..."]
    readers: Float[Array, "... B H 1 C K"]  # scale exp(G) q^
    keep: Float[Array, "... B H 1 X 1"]  # exp(G_C)
    betas: Float[Array, "... B C H"]


def absorb(
    state: Float[Array, "B H K V"],
    keys: Float[Array, "B H X K"],
    values: Float[Array, "B H X V"],
    betas: Float[Array, "B H X"],
    positions: Int32[Array, "B H X"],
    dropped: Bool[Array, "B H X"],
    params: CacheParams,
    config: MemoryConfig,
) -> Float[Array, "B H K V"]:
    """S after the pairs that are dropped, in the order of their positions; `keys` as they are stored."""
    order = jnp.argsort(positions, axis=-1)

    def in_order(x: Array) -> Array:
        ordered = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 3)), axis=2)
        return ordered.swapaxes(1, 2)  # [B, X, H, ...]

    strength = in_order(jnp.where(dropped, betas, 0.0))
    k = in_order(of_state(keys, params, config))
    given = (jnp.zeros_like(k), k, in_order(values), strength, jnp.zeros_like(strength))
    return delta_rule(*given, scale=1.0, chunk=config.chunk, scan=config.scan, initial=state).final


def dropped_pairs(scores: Float[Array, "B H X"], index: Int32[Array, "B H W"]) -> Bool[Array, "B H X"]:
    """Those that compete and are not among the chosen."""
    chosen = jnp.put_along_axis(jnp.zeros(scores.shape, bool), index, True, axis=-1, inplace=False)
    return (scores > -jnp.inf) & ~chosen


def _steps(piece: Piece, config: MemoryConfig, state: MemoryState) -> Steps:
    q, _, values, _, log_decay = piece.inputs
    heads, block = values.shape[2], config.block
    decay, masks = log_decay if log_decay.ndim == 4 else log_decay[..., None], None
    if piece.several:
        decay = jnp.where((piece.own > 0)[..., None, None], decay, 0.0)
        masks = document_masks(piece.own, state.document, block)
    queries = config.scale(q.shape[-1]) * jnp.repeat(unit_l2(q), heads // q.shape[2], axis=2)
    of_blocks = decays(to_chunks(decay.astype(jnp.float32), block, heads), masks)
    readers = to_chunks(queries, block, heads) * of_blocks.entering
    assert piece.betas is not None
    betas = piece.betas.reshape(values.shape[0], -1, block, heads).swapaxes(0, 1)
    return Steps(jnp.arange(len(betas), dtype=jnp.int32), readers, of_blocks.keep, betas)


def run_blocks(
    fresh: bool,
    piece: Piece,
    positions: Int32[Array, "B L"],
    whole: Int32[Array, " B"],
    params: CacheParams,
    config: MemoryConfig,
    state: MemoryState,
) -> tuple[Float[Array, "B L H V"], Float[Array, "B L H V"], Kept, Float[Array, "B H K V"]]:
    """(what S answers to each place, what the cache read does, the cache and S after the piece)."""
    length, heads = piece.values.shape[1:3]
    scores = jnp.zeros((piece.values.shape[0], heads, length), jnp.float32)
    assert state.cache_betas is not None
    first = Carried(state.fast_weights[:, :, None], cache_of(state), state.cache_betas)

    def step(carried: Carried, given: tuple[Steps, Block]) -> tuple[Carried, tuple[Rows, Array]]:
        at, block = given
        found = jnp.matmul(at.readers, carried.weights, precision=HIGHEST)
        weights = at.keep * carried.weights
        now = recall_scores(lax.stop_gradient(weights[:, :, 0]), carried.cache, block, params, config)
        pairs = candidates(carried.cache, block, *now)
        held, index = best(pairs, config)
        betas = jnp.concatenate([carried.betas, at.betas.swapaxes(1, 2)], axis=-1)
        dropped = dropped_pairs(pairs.scores, index)
        absorbed = absorb(weights[:, :, 0], pairs.keys, pairs.values, betas, pairs.positions, dropped, params, config)
        after = Carried(absorbed[:, :, None], held, jnp.take_along_axis(betas, index, axis=-1))
        carried_on = select(at.number < whole, after, carried._replace(weights=weights))
        return carried_on, (carried.cache.rows, found)

    given = (_steps(piece, config, state), blocks_of(piece, scores, positions, config))
    last, (rows, found) = lax.scan(jax.checkpoint(step, prevent_cse=False), first, given)
    rows = Rows(*(jnp.concatenate([a, b[None]]) for a, b in zip(rows, last.cache.rows, strict=True)))
    o_cache = read_rows(piece, scores, rows, params, config, state, fresh)
    cache = last.cache
    kept = Kept(cache.keys, cache.values, cache.rows.scores, cache.positions, cache.rows.document, last.betas)
    return from_chunks(found, length), o_cache, kept, last.weights[:, :, 0]
