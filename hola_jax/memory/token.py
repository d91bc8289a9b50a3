"""One token of every row: the decoding path. Rows may stand at different positions; padding changes nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Bool, Int32
from hola_jax.memory.align import Inputs
from hola_jax.memory.cache_read import read_token
from hola_jax.memory.delta_rule import delta_rule_token
from hola_jax.memory.exact_cache import best_rows, token_scores
from hola_jax.memory.norms import for_reading, unit_l2
from hola_jax.memory.state import EMPTY, CacheParams, MemoryConfig, MemoryState


def run_token(
    inputs: Inputs, params: CacheParams, config: MemoryConfig, document: Int32[Array, " B"], state: MemoryState
) -> tuple[Array, MemoryState]:
    """One token of every row: the decoding path. Rows may stand at different positions; padding changes nothing."""
    q, k, v, beta, log_decay = (x[:, 0] for x in inputs)
    batch, heads, _ = v.shape
    key_heads, block = k.shape[1], config.block
    real = document > 0
    new = real & (document != state.document)
    state = lax.cond(jnp.any(new), lambda s: _forget_rows(s, new, document), lambda s: s, state)

    beta = jnp.where(real[:, None], beta, 0.0)
    log_decay = jnp.where(real.reshape(-1, *[1] * (log_decay.ndim - 1)), log_decay, 0.0)
    group = heads // key_heads
    o_state, error, fast_weights = delta_rule_token(
        jnp.repeat(unit_l2(q), group, axis=1),
        jnp.repeat(unit_l2(k), group, axis=1),
        v,
        beta,
        log_decay,
        state.fast_weights,
        config.scale(k.shape[-1]),
    )
    norm = jnp.linalg.norm(lax.stop_gradient(error), axis=-1)
    magnitude = {"surprise": beta * norm, "residual": norm}.get(config.score)
    score = token_scores(config, magnitude, v, beta, state.position)
    query, key = for_reading(q, k, heads, params, config)

    fill = state.position % block
    row, slot = jnp.arange(batch), jnp.where(real, fill, block)  # a slot behind the block is dropped
    block_keys = state.block_keys.at[row, :, slot].set(key, mode="drop")
    block_values = state.block_values.at[row, :, slot].set(v, mode="drop")
    block_scores = state.block_scores.at[row, :, slot].set(score, mode="drop")
    index = jnp.arange(block)
    seen = (index <= fill[:, None]) & ((state.position - fill)[:, None] + index >= state.document_start[:, None])
    filled = state.cache_scores > -jnp.inf

    def apart(x: Array) -> Array:
        return x.reshape(batch, key_heads, group, *x.shape[2:])

    o_cache = read_token(
        apart(query),
        [apart(state.cache_keys), block_keys[:, :, None]],
        [apart(state.cache_values), apart(block_values)],
        [apart(filled), jnp.broadcast_to(seen[:, None, None], (batch, key_heads, group, block))],
        params.sink_logit.reshape(key_heads, group),
    ).reshape(batch, heads, -1)
    gate = jax.nn.sigmoid(params.gate_logit.astype(jnp.float32))[:, None]
    out = jnp.where(real[:, None, None], o_state + gate * o_cache, 0.0).astype(v.dtype)
    state = dataclasses.replace(
        state,
        fast_weights=fast_weights,
        block_keys=block_keys,
        block_values=block_values,
        block_scores=block_scores,
        position=state.position + real,
    )
    complete = real & (fill == block - 1)
    state = lax.cond(jnp.any(complete), lambda s: _merge_block(s, complete, seen), lambda s: s, state)
    return out[:, None], state


def _choose(rows: Bool[Array, " B"], new: MemoryState, old: MemoryState) -> MemoryState:
    """The state that is `new` in the named rows of the batch."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _forget_rows(state: MemoryState, rows: Bool[Array, " B"], document: Int32[Array, " B"]) -> MemoryState:
    """A new document begins in the named rows: nothing of the old one is kept but its tokens' share of the block."""
    empty = dataclasses.replace(
        state,
        fast_weights=jnp.zeros_like(state.fast_weights),
        cache_keys=jnp.zeros_like(state.cache_keys),
        cache_values=jnp.zeros_like(state.cache_values),
        cache_scores=jnp.full_like(state.cache_scores, -jnp.inf),
        cache_positions=jnp.full_like(state.cache_positions, EMPTY),
        document=document,
        document_start=state.position,
    )
    return _choose(rows, empty, state)


def _merge_block(state: MemoryState, rows: Bool[Array, " B"], seen: Bool[Array, "B C"]) -> MemoryState:
    """The named rows' running block is complete: its visible tokens compete with the cache, and the block is empty."""
    window, block = state.cache_scores.shape[-1], state.block_scores.shape[-1]
    heads, group = state.cache_scores.shape[1], state.cache_scores.shape[1] // state.block_keys.shape[1]
    scores = jnp.concatenate([state.cache_scores, jnp.where(seen[:, None], state.block_scores, -jnp.inf)], axis=-1)
    index = jnp.broadcast_to(jnp.arange(window + block, dtype=jnp.int32), scores.shape)
    best, index = best_rows(scores, index, window)
    filled = best > -jnp.inf
    in_block = (state.position[:, None] - block + jnp.arange(block, dtype=jnp.int32))[:, None]
    positions = jnp.concatenate(
        [state.cache_positions, jnp.broadcast_to(in_block, (in_block.shape[0], heads, block))], axis=-1
    )
    keys = jnp.concatenate([state.cache_keys, jnp.repeat(state.block_keys, group, axis=1)], axis=2)
    values = jnp.concatenate([state.cache_values, state.block_values], axis=2)
    take = jax.vmap(jax.vmap(lambda x, i: x[i]))
    merged = dataclasses.replace(
        state,
        cache_keys=jnp.where(filled[..., None], take(keys, index), 0),
        cache_values=jnp.where(filled[..., None], take(values, index), 0),
        cache_scores=best,
        cache_positions=jnp.where(filled, take(positions, index), EMPTY),
        block_keys=jnp.zeros_like(state.block_keys),
        block_values=jnp.zeros_like(state.block_values),
        block_scores=jnp.zeros_like(state.block_scores),
    )
    return _choose(rows, merged, state)
