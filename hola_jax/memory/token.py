"""One token of every row: the decoding path. Rows may stand at different positions; padding changes nothing."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Bool, Float, Int32
from hola_jax.memory.align import Inputs
from hola_jax.memory.cache_read import read_token
from hola_jax.memory.choice import best_of
from hola_jax.memory.delta_rule import delta_rule_token
from hola_jax.memory.eviction import absorb, dropped_pairs
from hola_jax.memory.exact_cache import best_rows, token_scores
from hola_jax.memory.learned import retained
from hola_jax.memory.norms import for_reading, unit_l2, with_power, with_score
from hola_jax.memory.poison import cleaned, not_finite, spoil
from hola_jax.memory.rescored import recall_error
from hola_jax.memory.state import EMPTY, CacheParams, MemoryConfig, MemoryState, select


class Rows(NamedTuple):
    """Fields of a state: what a document's beginning or a block's end changes, by conditionals. S is none of them, for a
    conditional may copy what passes through it."""

    cache_keys: Float[Array, "B H W K"]
    cache_values: Float[Array, "B H W V"]
    cache_scores: Float[Array, "B H W"]
    cache_positions: Int32[Array, "B H W"]
    block_keys: Float[Array, "B h C K"]
    block_values: Float[Array, "B H C V"]
    block_scores: Float[Array, "B H C"]
    cache_betas: Float[Array, "B H W"] | None  # where pairs are written when they are dropped
    block_betas: Float[Array, "B H C"] | None


class Clean(NamedTuple):
    """A token without NaN and inf, and what those spoil: nothing at padding."""

    inputs: Inputs
    writes: Bool[Array, "B H"]  # the state, and so the answer
    asks: Bool[Array, "B H"]  # the answer alone


def clean_token(inputs: Inputs, document: Int32[Array, " B"]) -> Clean:
    """As `poison.cleared`, of one token; the state is left to who passes over it anyway."""
    q, k, *others = inputs
    bad_query, bad_key = not_finite(q), not_finite(k)
    bad = jnp.stack([not_finite(x) for x in others]).any(0)
    group, real = bad.shape[2] // k.shape[2], (document > 0)[:, None]
    writes = bad | jnp.repeat(bad_key, group, axis=2)
    clean = Inputs(cleaned(q, bad_query), cleaned(k, bad_key), *(cleaned(x, bad) for x in others))
    return Clean(clean, writes[:, 0] & real, jnp.repeat(bad_query, group, axis=2)[:, 0] & real)


def run_token(
    inputs: Inputs,
    params: CacheParams,
    config: MemoryConfig,
    document: Int32[Array, " B"],
    state: MemoryState,
    learned: Float[Array, "B H"] | None = None,
) -> tuple[Array, MemoryState]:
    """One token of every row: the decoding path. Rows may stand at different positions; padding changes nothing.

    S is read in one pass, and read and written in another: nobody looks for NaN in it but by what it answers.
    """
    clean = clean_token(inputs, document)
    q, k, v, beta, log_decay = (x[:, 0] for x in clean.inputs)
    (batch, heads, _), block = v.shape, config.block
    real = document > 0
    new = real & (document != state.document)
    rows = Rows(*(getattr(state, name) for name in Rows._fields))
    rows = lax.cond(jnp.any(new), lambda rows: _forget(rows, new), lambda rows: rows, rows)
    document_start = jnp.where(new, state.position, state.document_start)

    beta = jnp.where(real[:, None], beta, 0.0)
    log_decay = jnp.where(real.reshape(-1, *[1] * (log_decay.ndim - 1)), log_decay, 0.0)
    group, late = heads // k.shape[1], config.write == "eviction"
    o_state, error, fast_weights = delta_rule_token(
        jnp.repeat(unit_l2(q), group, axis=1),
        jnp.repeat(unit_l2(k), group, axis=1),
        v,
        jnp.zeros_like(beta) if late else beta,
        log_decay,
        state.fast_weights,
        config.scale(k.shape[-1]),
        new,
    )
    # What S holds that is not finite shows in the error, for its whole column. Such a head competes with nothing.
    lost = jnp.isnan(jnp.sum(0 * error, axis=-1))
    spoilt = clean.writes | lost
    norm = jnp.linalg.norm(jnp.where(lost[..., None], 0.0, lax.stop_gradient(error)), axis=-1)
    magnitude = {"surprise": beta * norm, "residual": norm}.get(config.score)
    score = token_scores(config, magnitude, v, beta, state.position, learned)
    query, key = for_reading(q, k, heads, params, config)

    fill = state.position % block
    row, slot = jnp.arange(batch), jnp.where(real, fill, block)  # a slot behind the block is dropped
    rows = rows._replace(
        block_keys=rows.block_keys.at[row, :, slot].set(key, mode="drop"),
        block_values=rows.block_values.at[row, :, slot].set(
            v if learned is None else retained(v, learned), mode="drop"
        ),
        block_scores=rows.block_scores.at[row, :, slot].set(score, mode="drop"),
        block_betas=None if rows.block_betas is None else rows.block_betas.at[row, :, slot].set(beta, mode="drop"),
    )
    index = jnp.arange(block)
    seen = (index <= fill[:, None]) & ((state.position - fill)[:, None] + index >= document_start[:, None])
    o_cache, given = _read(query, rows, seen, params, config)
    if config.read_weight:
        given = jnp.where(real[:, None, None], config.read_weight * given, 0.0)
        rows = rows._replace(
            cache_scores=rows.cache_scores + given[..., : config.window],
            block_scores=rows.block_scores + given[..., config.window :],
        )
    gate = jax.nn.sigmoid(params.gate_logit.astype(jnp.float32))[:, None]
    out = spoil(jnp.where(real[:, None, None], o_state + gate * o_cache, 0.0), (spoilt | clean.asks) & real[:, None])
    complete, position = real & (fill == block - 1), state.position + real

    def merged(rows: Rows, weights: Array | None) -> tuple[Rows, Array | None]:
        rows, absorbed = _merge(rows, complete, seen, position, config, params, fast_weights)
        return rows, None if weights is None else select(complete, absorbed, weights)

    held = fast_weights if late else None  # what passes through a conditional may be copied
    rows, held = lax.cond(jnp.any(complete), merged, lambda *given: given, rows, held)
    fast_weights = fast_weights if held is None else held
    state = dataclasses.replace(
        state,
        fast_weights=spoil(fast_weights, spoilt),
        position=position,
        document=jnp.where(new, document, state.document),
        document_start=document_start,
        **rows._asdict(),
    )
    return out[:, None].astype(v.dtype), state


def _read(
    query: Float[Array, "B H K"], rows: Rows, seen: Bool[Array, "B C"], params: CacheParams, config: MemoryConfig
) -> tuple[Float[Array, "B H V"], Float[Array, "B H X"]]:
    """What the cache's rows and the visible tokens of the block answer, and the softmax weights of each."""
    batch, heads, _ = query.shape
    of_cache, of_block, key_heads = rows.cache_keys, rows.block_keys, rows.block_keys.shape[1]
    if config.read_power:
        query = with_power(query, params)
        of_cache, of_block = with_score(of_cache, rows.cache_scores, 1), with_score(of_block, rows.block_scores, 1)
        key_heads = heads
    group = heads // key_heads

    def apart(x: Array) -> Array:
        return x.reshape(batch, key_heads, group, *x.shape[2:])

    filled = rows.cache_scores > -jnp.inf
    found, given = read_token(
        apart(query),
        [apart(of_cache), of_block[:, :, None]],
        [apart(rows.cache_values), apart(rows.block_values)],
        [apart(filled), jnp.broadcast_to(seen[:, None, None], (batch, key_heads, group, seen.shape[-1]))],
        params.sink_logit.reshape(key_heads, group),
        config.read_energy,
    )
    return found.reshape(batch, heads, -1), lax.stop_gradient(given).reshape(batch, heads, -1)


def _forget(rows: Rows, which: Bool[Array, " B"]) -> Rows:
    """A new document begins in the named rows of the batch: nothing of the old one is kept but its tokens' share of the
    block, which is not seen."""
    empty = rows._replace(
        cache_keys=jnp.zeros_like(rows.cache_keys),
        cache_values=jnp.zeros_like(rows.cache_values),
        cache_scores=jnp.full_like(rows.cache_scores, -jnp.inf),
        cache_positions=jnp.full_like(rows.cache_positions, EMPTY),
        cache_betas=None if rows.cache_betas is None else jnp.zeros_like(rows.cache_betas),
    )
    return select(which, empty, rows)


def _merge(
    rows: Rows,
    which: Bool[Array, " B"],
    seen: Bool[Array, "B C"],
    position: Int32[Array, " B"],
    config: MemoryConfig,
    params: CacheParams,
    fast_weights: Float[Array, "B H K V"],
) -> tuple[Rows, Float[Array, "B H K V"] | None]:
    """The running block of the named rows of the batch is complete: its visible tokens compete with the cache, and the block
    is empty. And S with what was dropped, where that is written then."""
    window, block = rows.cache_scores.shape[-1], rows.block_scores.shape[-1]
    heads, group = rows.cache_scores.shape[1], rows.cache_scores.shape[1] // rows.block_keys.shape[1]
    scores = jnp.concatenate([rows.cache_scores, jnp.where(seen[:, None], rows.block_scores, -jnp.inf)], axis=-1)
    in_block = (position[:, None] - block + jnp.arange(block, dtype=jnp.int32))[:, None]
    positions = jnp.concatenate(
        [rows.cache_positions, jnp.broadcast_to(in_block, (in_block.shape[0], heads, block))], axis=-1
    )
    keys = jnp.concatenate([rows.cache_keys, jnp.repeat(rows.block_keys, group, axis=1)], axis=2)
    values = jnp.concatenate([rows.cache_values, rows.block_values], axis=2)
    if config.score == "recall":
        error = lax.stop_gradient(recall_error(fast_weights, keys, values, params, config))
        scores = jnp.where(scores > -jnp.inf, error, -jnp.inf)
    if config.rescored:
        best, index = best_of(config, scores, positions, keys)
    else:
        best, index = best_rows(scores, lax.broadcasted_iota(jnp.int32, scores.shape, 2), window)
    filled = best > -jnp.inf
    take = jax.vmap(jax.vmap(lambda x, i: x[i]))
    betas = absorbed = None
    if rows.cache_betas is not None and rows.block_betas is not None:
        betas = jnp.concatenate([rows.cache_betas, rows.block_betas], axis=-1)
        dropped = dropped_pairs(scores, index)
        absorbed = absorb(fast_weights, keys, values, betas, positions, dropped, params, config)
        betas = jnp.where(filled, jnp.take_along_axis(betas, index, axis=-1), 0)
    merged = Rows(
        cache_keys=jnp.where(filled[..., None], take(keys, index), 0),
        cache_values=jnp.where(filled[..., None], take(values, index), 0),
        cache_scores=best,
        cache_positions=jnp.where(filled, take(positions, index), EMPTY),
        block_keys=jnp.zeros_like(rows.block_keys),
        block_values=jnp.zeros_like(rows.block_values),
        block_scores=jnp.zeros_like(rows.block_scores),
        cache_betas=betas,
        block_betas=None if rows.block_betas is None else jnp.zeros_like(rows.block_betas),
    )
    return select(which, merged, rows), absorbed
