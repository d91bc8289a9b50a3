"""The specification: HOLA token by token, for one row and one head, with the paper's equation numbers.

Nothing here is clever or fast. Every other implementation is tested against it, forward and backward.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Float, Int
from hola_jax.memory.choice import log_score
from hola_jax.memory.exact_cache import hashed_score
from hola_jax.memory.learned import competing, retained
from hola_jax.memory.norms import of_state, rms_norm, unit_l2
from hola_jax.memory.state import EMPTY, CacheParams, MemoryConfig, MemoryState

HEADS = "heads"  # the axis along which all heads see each other's scores


class Head(NamedTuple):
    """The memory of one head; the fields of `MemoryState` without batch and heads."""

    fast_weights: Array
    cache_keys: Array
    cache_values: Array
    cache_scores: Array
    cache_positions: Array
    block_keys: Array
    block_values: Array
    block_scores: Array
    position: Array
    document: Array
    document_start: Array
    cache_betas: Array | None  # where pairs are written when they are dropped
    block_betas: Array | None


class Token(NamedTuple):
    q: Array
    k: Array
    v: Array
    beta: Array
    log_decay: Array
    learned: Array
    document: Array


def _score(config: MemoryConfig, token: Token, error: Array, position: Array, head: Array, heads: int) -> Array:
    """m_t: what the token competes with. No gradient flows through it."""
    score = {
        "surprise": token.beta * jnp.linalg.norm(error),  # Eq. 6
        "residual": jnp.linalg.norm(error),
        "write": token.beta * jnp.linalg.norm(token.v.astype(jnp.float32)),
        "recency": position.astype(jnp.float32),
        "random": hashed_score(position, heads, config.seed)[head],
        "attention": jnp.float32(0),  # nobody has read it yet
        "recall": jnp.float32(0),  # until the block is complete
        "learned": competing(token.learned, config.sparsity),
    }[config.score]
    if config.fade is not None or config.read_credit:  # as a logarithm, so that an age can be added, or what reads gave
        score = log_score(score) + (0.0 if config.fade is None else position / config.fade)
    return lax.stop_gradient(score)


def _for_reading(config: MemoryConfig, params: CacheParams, token: Token, head: Array) -> tuple[Array, Array]:
    """q~ with the temperature multiplied in, and k~ as it is stored."""
    if config.read == "rmsnorm":
        assert params.query_scale is not None and params.key_scale is not None
        query = rms_norm(token.q, params.query_scale) * token.q.shape[-1] ** -0.5
        return query, rms_norm(token.k, params.key_scale).astype(token.k.dtype)
    assert params.temperature is not None
    return unit_l2(token.q) * params.temperature[head], unit_l2(token.k).astype(token.k.dtype)


def _start_document(memory: Head, document: Array) -> Head:
    """An empty memory at the same position."""
    return memory._replace(
        fast_weights=jnp.zeros_like(memory.fast_weights),
        cache_keys=jnp.zeros_like(memory.cache_keys),
        cache_values=jnp.zeros_like(memory.cache_values),
        cache_scores=jnp.full_like(memory.cache_scores, -jnp.inf),
        cache_positions=jnp.full_like(memory.cache_positions, EMPTY),
        cache_betas=None if memory.cache_betas is None else jnp.zeros_like(memory.cache_betas),
        document=document,
        document_start=memory.position,
    )


def _without_superseded(scores: Array, positions: Array, keys: Array, cosine: float) -> Array:
    """Of pairs with one key the latest stays; each has the larger of its score and those of earlier ones."""
    norms = jnp.linalg.norm(keys.astype(jnp.float32), axis=-1)

    def one(score: Array, position: Array, key: Array, norm: Array) -> Array:
        alike = keys.astype(jnp.float32) @ key.astype(jnp.float32) >= cosine * norms * norm
        alike &= (scores > -jnp.inf) & (norms * norm > 0)  # a key of zeros is like none
        largest = jnp.max(jnp.where(alike & (positions < position), scores, -jnp.inf))
        gone = jnp.any(alike & (positions > position)) | (score == -jnp.inf)
        return jnp.where(gone, -jnp.inf, jnp.maximum(score, largest))

    return jax.vmap(one)(scores, positions, keys, norms)


def _within_budget(scores: Array, positions: Array, budget: int) -> Array:
    """Of this head's rows those that are among the best of all heads."""
    others, of_others = lax.all_gather(scores, HEADS), lax.all_gather(positions, HEADS)
    own, head = lax.axis_index(HEADS), jnp.arange(others.shape[0])[:, None]

    def rank(score: Array, position: Array) -> Array:
        earlier = (of_others < position) | ((of_others == position) & (head < own))
        return jnp.sum((others > score) | ((others == score) & earlier))

    return jnp.where(jax.vmap(rank)(scores, positions) < budget, scores, -jnp.inf)


def _finish_block(memory: Head, visible: Array, block_start: Array, params: CacheParams, config: MemoryConfig) -> Head:
    """The best W of the cache and of the block's visible tokens; the earlier token wins a tie."""
    block, window = config.block, config.window
    scores = jnp.concatenate([memory.cache_scores, jnp.where(visible, memory.block_scores, -jnp.inf)])
    keys = jnp.concatenate([memory.cache_keys, memory.block_keys])
    values = jnp.concatenate([memory.cache_values, memory.block_values])
    if config.score == "recall":  # LoLA's SRE with HOLA's state: |S' k^ - v|
        error = of_state(keys, params, config) @ memory.fast_weights - values.astype(jnp.float32)
        scores = jnp.where(scores > -jnp.inf, lax.stop_gradient(jnp.linalg.norm(error, axis=-1)), -jnp.inf)
    positions = jnp.concatenate([memory.cache_positions, block_start + jnp.arange(block)])
    if config.same_key is not None:
        scores = _without_superseded(scores, positions, keys, config.same_key)
    best = jnp.lexsort((positions, -scores))[:window]
    if config.budget is not None:
        scores = scores.at[best].set(_within_budget(scores[best], positions[best], config.budget))
    if config.write == "eviction":
        memory = _absorb(memory, keys, values, positions, best, scores > -jnp.inf, params, config)
    filled = scores[best] > -jnp.inf
    return memory._replace(
        cache_keys=jnp.where(filled[:, None], keys[best], 0),
        cache_values=jnp.where(filled[:, None], values[best], 0),
        cache_scores=scores[best],
        cache_positions=jnp.where(filled, positions[best], EMPTY),
        block_keys=jnp.zeros_like(memory.block_keys),
        block_values=jnp.zeros_like(memory.block_values),
        block_scores=jnp.zeros_like(memory.block_scores),
    )


def _absorb(
    memory: Head,
    keys: Array,
    values: Array,
    positions: Array,
    best: Array,
    competes: Array,
    params: CacheParams,
    config: MemoryConfig,
) -> Head:
    """The pairs that competed and are not the best are written to S, the earliest first; the others keep their betas."""
    assert memory.cache_betas is not None and memory.block_betas is not None
    betas = jnp.concatenate([memory.cache_betas, memory.block_betas])
    dropped = competes & ~jnp.zeros(competes.shape, bool).at[best].set(True)

    def write(state: Array, pair: tuple[Array, ...]) -> tuple[Array, None]:
        k, v, beta, dropped = pair
        return jnp.where(dropped, state + beta * jnp.outer(k, v - k @ state), state), None

    pairs = (of_state(keys, params, config), values.astype(jnp.float32), betas, dropped)
    order = jnp.argsort(positions)
    return memory._replace(
        fast_weights=lax.scan(write, memory.fast_weights, tuple(x[order] for x in pairs))[0],
        cache_betas=jnp.where(competes[best], betas[best], 0),
        block_betas=jnp.zeros_like(memory.block_betas),
    )


def _token(
    memory: Head, token: Token, head: Array, heads: int, params: CacheParams, config: MemoryConfig
) -> tuple[Head, Array]:
    """One token that is not padding: (memory after it, its output)."""
    fresh = _start_document(memory, token.document)
    memory = jax.tree.map(lambda a, b: jnp.where(token.document != memory.document, a, b), fresh, memory)
    scale = config.scale(token.k.shape[-1])
    q, k, v = unit_l2(token.q), unit_l2(token.k), token.v.astype(jnp.float32)
    alpha = jnp.exp(token.log_decay)  # one number, or one per key channel

    decayed = jnp.reshape(alpha, (-1, 1)) * memory.fast_weights
    error = v - k @ decayed  # Eq. 3
    late = config.write == "eviction"  # S waits for what the cache drops
    state = decayed if late else decayed + token.beta * jnp.outer(k, error)  # Eq. 1
    o_state = scale * (q @ state)

    block = config.block
    fill = memory.position % block
    query, key = _for_reading(config, params, token, head)
    memory = memory._replace(
        fast_weights=state,
        block_keys=memory.block_keys.at[fill].set(key),
        block_values=memory.block_values.at[fill].set(
            retained(token.v, token.learned) if config.score == "learned" else token.v
        ),
        block_scores=memory.block_scores.at[fill].set(_score(config, token, error, memory.position, head, heads)),
        block_betas=None if memory.block_betas is None else memory.block_betas.at[fill].set(token.beta),
    )
    block_start = memory.position - fill
    index = jnp.arange(block)
    visible = (index <= fill) & (block_start + index >= memory.document_start)
    allowed = jnp.concatenate([memory.cache_scores > -jnp.inf, visible, jnp.ones(1, bool)])  # ... and the null sink
    keys = jnp.concatenate([memory.cache_keys, memory.block_keys]).astype(jnp.float32)
    values = jnp.concatenate([memory.cache_values, memory.block_values]).astype(jnp.float32)
    products = keys @ query
    if config.read_power:  # softmax weights times m ** power
        assert params.power is not None
        of_score = log_score(jnp.concatenate([memory.cache_scores, memory.block_scores]))
        products = products + params.power[head] * lax.stop_gradient(of_score)
    logits = jnp.append(products, params.sink_logit[head])
    weights = jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf))  # Eq. 7
    read = weights
    if config.read_energy is not None:  # the fewest that hold this share of the read
        order = -jnp.sort(-weights)
        least = jnp.min(jnp.where(jnp.cumsum(order) - order < config.read_energy, order, jnp.inf))
        read = jnp.where(weights >= lax.stop_gradient(least), weights, 0.0)
        read = read / jnp.sum(read)
    o_cache = read[:-1] @ values
    out = o_state + jax.nn.sigmoid(params.gate_logit[head]) * o_cache
    if config.read_weight:  # H2O: a_j <- a_j + w_tj, the null sink in the softmax's sum
        given = config.read_weight * lax.stop_gradient(weights)
        memory = memory._replace(
            cache_scores=memory.cache_scores + given[: config.window],
            block_scores=memory.block_scores + given[config.window : -1],
        )

    full = _finish_block(memory, visible, block_start, params, config)
    memory = jax.tree.map(lambda a, b: jnp.where(fill == block - 1, a, b), full, memory)
    return memory._replace(position=memory.position + 1), out


def hola_reference(
    q: Float[Array, "B T h K"],
    k: Float[Array, "B T h K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"],
    params: CacheParams,
    config: MemoryConfig,
    documents: Int[Array, "B T"],
    state: MemoryState,
    learned: Float[Array, "B T H"] | None = None,
) -> tuple[Float[Array, "B T H V"], MemoryState]:
    """Outputs (0 at padding) and the state after the last token; `documents` is 0 at padding."""
    heads, group = v.shape[2], v.shape[2] // k.shape[2]

    def one_head(memory: Head, tokens: Token, head: Array) -> tuple[Head, Array]:
        def step(memory: Head, token: Token) -> tuple[Head, Array]:
            after, out = _token(memory, token, head, heads, params, config)
            real = token.document > 0
            return jax.tree.map(lambda a, b: jnp.where(real, a, b), after, memory), jnp.where(real, out, 0.0)

        return lax.scan(step, memory, tokens)

    per_head = Token._make(1 if x.ndim > 2 else None for x in (q, k, v, beta, log_decay, beta, documents))
    counters = ("position", "document", "document_start")
    memory_axes = Head._make(None if name in counters else 0 for name in Head._fields)
    after_axes = Head._make(0 for _ in Head._fields)
    fields = {name: getattr(state, name) for name in Head._fields}
    memory = Head(**{**fields, "block_keys": jnp.repeat(state.block_keys, group, axis=1)})
    learned = jnp.zeros_like(beta) if learned is None else learned
    tokens = Token(jnp.repeat(q, group, axis=2), jnp.repeat(k, group, axis=2), v, beta, log_decay, learned, documents)
    after, out = jax.vmap(
        lambda memory, tokens: jax.vmap(one_head, (memory_axes, per_head, 0), (after_axes, 1), axis_name=HEADS)(
            memory, tokens, jnp.arange(heads)
        )
    )(memory, tokens)
    fields = after._asdict() | {"block_keys": after.block_keys[:, ::group]}
    for name in counters:
        fields[name] = fields[name][:, 0]
    return out.astype(v.dtype), MemoryState(**fields, config=state.config)
