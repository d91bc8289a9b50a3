"""The specification of LoLA's memory (2505.23666): token by token, for one row and one head.

Nothing here is clever or fast. `lola` is tested against it, forward and backward.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Float, Int
from hola_jax.memory.lola_state import LEAST_FEATURE, LEAST_MASS, LolaParams, LolaState
from hola_jax.memory.state import EMPTY, MemoryConfig


class Head(NamedTuple):
    """The memory of one head; fields of `LolaState` without batch and heads."""

    associations: Array
    mass: Array
    cache_keys: Array
    cache_values: Array
    cache_positions: Array
    block_keys: Array
    block_values: Array
    position: Array
    document: Array
    document_start: Array


class Token(NamedTuple):
    q: Array
    k: Array
    v: Array
    document: Array


def _phi(x: Float[Array, " K"], weights: Float[Array, "K F"]) -> Float[Array, " E"]:
    z = x.astype(jnp.float32) @ weights  # phi(x) = [softmax(x W), softmax(-x W)]
    return jnp.maximum(jnp.concatenate([jax.nn.softmax(z), jax.nn.softmax(-z)]), LEAST_FEATURE)


def _start_document(memory: Head, document: Array) -> Head:
    """An empty memory at the same position."""
    empty = jax.tree.map(jnp.zeros_like, memory)
    return empty._replace(
        cache_positions=jnp.full_like(memory.cache_positions, EMPTY),
        position=memory.position,
        document=document,
        document_start=memory.position,
    )


def _finish_block(memory: Head, visible: Array, block_start: Array, params: LolaParams, config: MemoryConfig) -> Head:
    """The W worst recalled of the cache and of the block's visible pairs stay exact, of equals the earlier; the others are
    absorbed."""
    keys = jnp.concatenate([memory.cache_keys, memory.block_keys])
    values = jnp.concatenate([memory.cache_values, memory.block_values])
    positions = jnp.concatenate([memory.cache_positions, block_start + jnp.arange(config.block)])
    held = jnp.concatenate([memory.cache_positions != EMPTY, visible])

    def error(k: Array, v: Array) -> Array:  # SRE = |phi(k)' H / (phi(k)' s + 1e-6) - v|
        phi = _phi(k, params.key_features)
        return jnp.linalg.norm(phi @ memory.associations / (phi @ memory.mass + LEAST_MASS) - v)

    scores = jnp.where(held, lax.stop_gradient(jax.vmap(error)(keys, values)), -jnp.inf)
    order = jnp.lexsort((positions, -scores))
    best, others = order[: config.window], order[config.window :]

    def absorb(store: tuple[Array, Array], which: Array) -> tuple[tuple[Array, Array], None]:
        associations, mass = store
        phi = jnp.where(held[which], _phi(keys[which], params.key_features), 0.0)
        return (associations + jnp.outer(phi, values[which]), mass + phi), None  # H += phi(k) v', s += phi(k)

    (associations, mass), _ = lax.scan(absorb, (memory.associations, memory.mass), others)
    filled = held[best]
    return memory._replace(
        associations=associations,
        mass=mass,
        cache_keys=jnp.where(filled[:, None], keys[best], 0),
        cache_values=jnp.where(filled[:, None], values[best], 0),
        cache_positions=jnp.where(filled, positions[best], EMPTY),
        block_keys=jnp.zeros_like(memory.block_keys),
        block_values=jnp.zeros_like(memory.block_values),
    )


def _token(memory: Head, token: Token, params: LolaParams, config: MemoryConfig) -> tuple[Head, Array]:
    """One token that is not padding: (memory after it, its output)."""
    fresh = _start_document(memory, token.document)
    memory = jax.tree.map(lambda a, b: jnp.where(token.document != memory.document, a, b), fresh, memory)
    fill = memory.position % config.block
    memory = memory._replace(
        block_keys=memory.block_keys.at[fill].set(token.k), block_values=memory.block_values.at[fill].set(token.v)
    )
    block_start, index = memory.position - fill, jnp.arange(config.block)
    visible = (index <= fill) & (block_start + index >= memory.document_start)
    allowed = jnp.concatenate([memory.cache_positions != EMPTY, visible])
    keys = jnp.concatenate([memory.cache_keys, memory.block_keys]).astype(jnp.float32)
    values = jnp.concatenate([memory.cache_values, memory.block_values]).astype(jnp.float32)

    # y = (w sum e^(q'k / sqrt K) v + (1 - w) phi(q)' H) / (w sum e^(q'k / sqrt K) + (1 - w) phi(q)' s + 1e-6),
    # above and below times e^-shift, so that nothing overflows
    logits = jnp.where(allowed, keys @ token.q.astype(jnp.float32) * token.q.shape[0] ** -0.5, -jnp.inf)
    shift = lax.stop_gradient(jnp.maximum(jnp.max(logits), 0.0))
    w, weights, phi = jax.nn.sigmoid(params.mix_logit), jnp.exp(logits - shift), _phi(token.q, params.query_features)
    above = w * weights @ values + (1 - w) * jnp.exp(-shift) * phi @ memory.associations
    below = w * jnp.sum(weights) + (1 - w) * jnp.exp(-shift) * phi @ memory.mass + LEAST_MASS * jnp.exp(-shift)

    full = _finish_block(memory, visible, block_start, params, config)
    memory = jax.tree.map(lambda a, b: jnp.where(fill == config.block - 1, a, b), full, memory)
    return memory._replace(position=memory.position + 1), above / below


def lola_reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    params: LolaParams,
    config: MemoryConfig,
    documents: Int[Array, "B T"],
    state: LolaState,
) -> tuple[Float[Array, "B T H V"], LolaState]:
    """Outputs (float32, 0 at padding) and the state after the last token; `documents` is 0 at padding."""

    def one_head(memory: Head, tokens: Token, params: LolaParams) -> tuple[Head, Array]:
        def step(memory: Head, token: Token) -> tuple[Head, Array]:
            after, out = _token(memory, token, params, config)
            real = token.document > 0
            return jax.tree.map(lambda a, b: jnp.where(real, a, b), after, memory), jnp.where(real, out, 0.0)

        return lax.scan(step, memory, tokens)

    counters = ("position", "document", "document_start")
    memory_axes = Head._make(None if name in counters else 0 for name in Head._fields)
    heads = jax.vmap(one_head, (memory_axes, Token._make((1, 1, 1, None)), 0), (Head._make([0] * len(Head._fields)), 1))
    memory = Head(*(getattr(state, name) for name in Head._fields))
    tokens = Token(q, k, v, documents.astype(jnp.int32))
    after, out = jax.vmap(heads, (0, 0, None))(memory, tokens, params)
    fields = {name: x[:, 0] if name in counters else x for name, x in after._asdict().items()}
    return out, dataclasses.replace(state, **fields)
