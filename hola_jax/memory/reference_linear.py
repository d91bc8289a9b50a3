"""The specification of the memories without a cache: token by token, for one row and one head.

Nothing here is clever or fast. Every other implementation is tested against it, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Float, Int


def _every_head(
    token: Callable[[Any, Any], tuple[Any, Array]], states: Any, tokens: Any, documents: Array, document: Array
) -> tuple[Array, Any]:
    """Runs `token` along every row and head; a new document starts from zeros, padding changes nothing and reads 0."""

    def step(carry: Any, given: Any) -> tuple[Any, Array]:
        (states, document), (inputs, here) = carry, given
        start = jax.tree.map(lambda x: jnp.where(here == document, x, 0.0), states)
        after, out = token(start, inputs)
        real = here > 0
        carry = jax.tree.map(lambda new, old: jnp.where(real, new, old), (after, here), (states, document))
        return carry, jnp.where(real, out, 0.0)

    def one_head(states: Any, tokens: Any, documents: Array, document: Array) -> tuple[Any, Array]:
        (states, _), out = lax.scan(step, (states, document), (tokens, documents))
        return states, out

    heads = jax.vmap(one_head, in_axes=(0, 1, None, None), out_axes=(0, 1))
    states, out = jax.vmap(heads)(states, tokens, documents, document)
    return out, states


def _shared(x: Float[Array, "B T h K"], heads: int) -> Float[Array, "B T H K"]:
    return jnp.repeat(x.astype(jnp.float32), heads // x.shape[2], axis=2)


def linear_reference(
    q: Float[Array, "B T h K"],
    k: Float[Array, "B T h K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"] | None,
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"],
    scale: float,
    documents: Int[Array, "B T"],
    fast_weights: Float[Array, "B H K V"],
    document: Int[Array, " B"],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Outputs (0 at padding) and the state after the last token; `documents` is 0 at padding, q and k come normalised."""

    def token(state: Array, inputs: Any) -> tuple[Array, Array]:
        q, k, v, beta, log_decay = inputs
        decayed = jnp.reshape(jnp.exp(log_decay), (-1, 1)) * state  # one decay, or one per key channel
        state = decayed + (jnp.outer(k, v) if beta is None else beta * jnp.outer(k, v - k @ decayed))
        return state, scale * (q @ state)

    heads = v.shape[2]
    tokens = (_shared(q, heads), _shared(k, heads), v.astype(jnp.float32), beta, log_decay.astype(jnp.float32))
    return _every_head(token, fast_weights, tokens, documents, document)


def slot_reference(
    q: Float[Array, "B T h K"],
    k: Float[Array, "B T h K"],
    v: Float[Array, "B T H V"],
    log_forget: Float[Array, "B T H M"],
    documents: Int[Array, "B T"],
    slots: tuple[Float[Array, "B H M K"], Float[Array, "B H M V"]],
    document: Int[Array, " B"],
) -> tuple[Float[Array, "B T H V"], tuple[Float[Array, "B H M K"], Float[Array, "B H M V"]]]:
    """Outputs (0 at padding) and the slots after the last token; `documents` is 0 at padding."""

    def token(slots: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], Array]:
        (keys, values), (q, k, v, log_forget) = slots, inputs
        forget = jnp.exp(log_forget)[:, None]
        keys = forget * keys + (1 - forget) * k
        values = forget * values + (1 - forget) * v
        return (keys, values), jax.nn.softmax(keys @ q) @ values

    heads = v.shape[2]
    tokens = (_shared(q, heads), _shared(k, heads), v.astype(jnp.float32), log_forget.astype(jnp.float32))
    return _every_head(token, slots, tokens, documents, document)
