"""Root mean square norms and what may stand in their place, in float32 inside; row by row, so nothing passes from one token
to another."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from hola_jax.array_types import Array, Float
from hola_jax.config import ModelConfig
from hola_jax.layers.lean import lean


class RMSNorm(nnx.Module):
    """x at root mean square 1 over its last axis, times a learned scale; in the type of `x`."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.scale = nnx.Param(jnp.ones(width), weight_decay=False)
        self.epsilon = epsilon

    def in_float32(self, x: Float[Array, "... D"], scale: Float[Array, " D"]) -> Float[Array, "... D"]:
        x = x.astype(jnp.float32)
        return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon) * scale

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return lean(lambda x, scale: self.in_float32(x, scale).astype(x.dtype))(x, self.scale[...])


class GatedNorm(RMSNorm):
    """RMSNorm_V(x) times an activation of the gate; without a gate the norm alone. Heads share the scale."""

    def __init__(self, width: int, epsilon: float, activation: Literal["silu", "sigmoid"] = "silu") -> None:
        super().__init__(width, epsilon)
        self.activation = activation

    def __call__(
        self, x: Float[Array, "B T H V"], gate: Float[Array, "B T H V"] | None = None
    ) -> Float[Array, "B T H V"]:
        return lean(self._gated)(x, gate, self.scale[...])

    def _gated(self, x: Array, gate: Array | None, scale: Array) -> Array:
        out = self.in_float32(x, scale)
        if gate is not None:
            activate = jax.nn.silu if self.activation == "silu" else jax.nn.sigmoid
            out = out * activate(gate.astype(jnp.float32))
        return out.astype(x.dtype)


class DynamicTanh(nnx.Module):
    """scale * tanh(alpha x) + shift (arXiv 2503.10622): bounds what is large as a norm does, and measures nothing."""

    def __init__(self, width: int) -> None:
        self.alpha = nnx.Param(jnp.full(1, 0.5), weight_decay=False)
        self.scale = nnx.Param(jnp.ones(width), weight_decay=False)
        self.shift = nnx.Param(jnp.zeros(width), weight_decay=False)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        bounded = jnp.tanh(self.alpha[...] * x.astype(jnp.float32))
        return (bounded * self.scale[...] + self.shift[...]).astype(x.dtype)


def norm_of(config: ModelConfig) -> RMSNorm | DynamicTanh:
    """A norm over D of the kind that is configured."""
    return DynamicTanh(config.dim) if config.norm == "dynamic_tanh" else RMSNorm(config.dim, config.norm_epsilon)
