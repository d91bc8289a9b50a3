"""How queries and keys are normalised: for the state, and for the read. In float32."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Float
from hola_jax.memory.choice import log_score
from hola_jax.memory.state import CacheParams, MemoryConfig

EPSILON = 1e-6


def unit_l2(x: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """x / sqrt(|x|^2 + 1e-6): what the state path reads and writes with."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPSILON)


def rms_norm(x: Float[Array, "... K"], scale: Float[Array, " K"]) -> Float[Array, "... K"]:
    """Root mean square 1, times a learned scale: what the exact cache is read with."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON) * scale


def of_state(key: Float[Array, "... K"], params: CacheParams, config: MemoryConfig) -> Float[Array, "... K"]:
    """k^ of a stored k~, in float32, so that the cache need not hold both: the scale divided out again, brought to unit
    length. A channel whose scale is 0 is lost."""
    key = key.astype(jnp.float32)
    if config.read == "unit_l2":
        return key
    assert params.key_scale is not None
    return unit_l2(jnp.where(params.key_scale == 0, 0.0, key / params.key_scale))


def with_power(query: Float[Array, "... H K"], params: CacheParams) -> Float[Array, "... H K+1"]:
    """Of a read whose softmax weights are multiplied by score ** power: one channel more, as `with_score` gives keys."""
    assert params.power is not None
    power = jnp.broadcast_to(params.power.astype(query.dtype), query.shape[:-1])
    return jnp.concatenate([query, power[..., None]], axis=-1)


def with_score(key: Float[Array, "..."], score: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Keys of h heads (along `axis`) as H heads have them, and behind each the logarithm of its score, which has no
    gradient. That of a row without a token is some number."""
    key = jnp.repeat(key, score.shape[axis] // key.shape[axis], axis=axis)
    of_score = lax.stop_gradient(log_score(score)).astype(key.dtype)
    return jnp.concatenate([key, of_score[..., None]], axis=-1)


def for_reading(q: Array, k: Array, heads: int, params: CacheParams, config: MemoryConfig) -> tuple[Array, Array]:
    """q~ [.., H, K] with the temperature multiplied in, float32, and k~ [.., h, K] as it is stored."""
    group = heads // k.shape[-2]
    if config.read == "rmsnorm":
        assert params.query_scale is not None and params.key_scale is not None
        query, key = rms_norm(q, params.query_scale) * k.shape[-1] ** -0.5, rms_norm(k, params.key_scale)
        return jnp.repeat(query, group, axis=-2), key.astype(k.dtype)
    assert params.temperature is not None
    query = jnp.repeat(unit_l2(q), group, axis=-2) * params.temperature[:, None]
    return query, unit_l2(k).astype(k.dtype)
