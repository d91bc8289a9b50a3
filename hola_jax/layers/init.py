"""Initial values of parameters. A parameter's random key comes from its name, so adding one reshuffles no other."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp

from hola_jax.array_types import Array, Float

STANDARD_DEVIATION = 0.02


def named_key(key: Array, name: str) -> Array:
    """The key of what is called `name` below whatever `key` belongs to."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def normal(key: Array, *shape: int) -> Float[Array, "..."]:
    return STANDARD_DEVIATION * jax.random.normal(key, shape, jnp.float32)


def log_uniform_rate(key: Array, heads: int, least: float) -> Float[Array, " H"]:
    """log U(least, 16): the logarithm of a decay's rate."""
    rate = jax.random.uniform(key, (heads,), jnp.float32, least, 16.0)
    return jnp.log(jnp.maximum(rate, 1e-4))  # U(0, 16) can draw 0


def step_bias(key: Array, size: int) -> Float[Array, " size"]:
    """The inverse softplus of a step that is log-uniform in [1e-3, 0.1]."""
    step = jnp.exp(jax.random.uniform(key, (size,), jnp.float32, jnp.log(1e-3), jnp.log(0.1)))
    return step + jnp.log(-jnp.expm1(-step))
