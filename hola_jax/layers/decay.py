"""How strongly the state forgets at each token, read from the input: log decays, float32 and at most 0."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from hola_jax.array_types import Array, Float
from hola_jax.config import ModelConfig
from hola_jax.layers.init import log_uniform_rate, named_key, step_bias
from hola_jax.layers.linear import Linear, LowRank


class HeadDecay(nnx.Module):
    """g = -exp(A_log) softplus(x W_a + dt_bias), one per head."""

    def __init__(self, config: ModelConfig, key: Array) -> None:
        self.projection = Linear(config.dim, config.heads, named_key(key, "projection"))
        self.A_log = nnx.Param(log_uniform_rate(named_key(key, "A_log"), config.heads, 0.0), weight_decay=False)
        self.dt_bias = nnx.Param(step_bias(named_key(key, "dt_bias"), config.heads), weight_decay=False)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        step = jax.nn.softplus(self.projection(x, jnp.float32) + self.dt_bias[...])
        return -jnp.exp(self.A_log[...]) * step


class NoDecay(nnx.Module):
    """g = 0."""

    def __init__(self, config: ModelConfig, key: Array) -> None:
        self.heads = config.heads

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        return jnp.zeros((*x.shape[:2], self.heads), jnp.float32)


class ChannelDecay(nnx.Module):
    """g = -exp(A_log) softplus(x W1 W2 + dt_bias), one per key channel; one A_log per head (KDA)."""

    def __init__(self, config: ModelConfig, key: Array) -> None:
        channels = config.heads * config.key_width
        self.projection = LowRank(config.dim, config.value_width, channels, named_key(key, "projection"))
        self.A_log = nnx.Param(log_uniform_rate(named_key(key, "A_log"), config.heads, 1.0), weight_decay=False)
        self.dt_bias = nnx.Param(step_bias(named_key(key, "dt_bias"), channels), weight_decay=False)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H K"]:
        step = jax.nn.softplus(self.projection(x, jnp.float32) + self.dt_bias[...])
        rate = jnp.exp(self.A_log[...])
        return -rate[:, None] * step.reshape(*x.shape[:2], rate.shape[0], -1)
