"""Kimi Delta Attention (2510.26692): the delta rule with a decay per key channel."""

from __future__ import annotations

from flax import nnx

from hola_jax.array_types import Array
from hola_jax.config import ModelConfig
from hola_jax.layers.decay import ChannelDecay
from hola_jax.layers.gated_delta_net import GatedDeltaNet
from hola_jax.layers.linear import LowRank
from hola_jax.layers.norm import GatedNorm


class KDA(GatedDeltaNet):
    """Gated DeltaNet with a decay per channel and a sigmoid gate of low rank."""

    decay_type = ChannelDecay

    def make_gate(self, config: ModelConfig, key: Array) -> nnx.Module:
        return LowRank(config.dim, config.value_width, config.heads * config.value_width, key, bias=True)

    def make_norm(self, config: ModelConfig) -> GatedNorm:
        return GatedNorm(config.value_width, config.norm_epsilon, "sigmoid")
