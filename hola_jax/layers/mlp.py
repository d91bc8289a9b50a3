"""The channel mixer."""

from __future__ import annotations

import jax
from flax import nnx

from hola_jax.array_types import Array, Float
from hola_jax.config import ModelConfig
from hola_jax.layers.init import named_key
from hola_jax.layers.lean import lean
from hola_jax.layers.linear import Linear


class SwiGLU(nnx.Module):
    """(SiLU(x W_gate) * x W_up) W_down."""

    def __init__(self, config: ModelConfig, key: Array) -> None:
        self.gate = Linear(config.dim, config.mlp_width, named_key(key, "gate"))
        self.up = Linear(config.dim, config.mlp_width, named_key(key, "up"))
        self.down = Linear(config.mlp_width, config.dim, named_key(key, "down"))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(lean(lambda gate, up: jax.nn.silu(gate) * up)(self.gate(x), self.up(x)))
