"""How much a token is to be kept, learned from its key and value and those of a few tokens before it (LTE).

LTE's net looks to both sides; here it looks back, or a token could not be scored when it is written.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from hola_jax.array_types import Array, Float, Int
from hola_jax.config import RETENTION_TAPS, ModelConfig, retention_channels
from hola_jax.layers import conv
from hola_jax.layers.conv import ConvState, HeadsConvolution
from hola_jax.layers.init import named_key

DILATION = 2
BIAS = 0.5  # of a new model's logits: all is worth keeping


class Retention(nnx.Module):
    """Three causal convolutions on [k; v], each head by itself, and a logit."""

    def __init__(self, config: ModelConfig, key: Array) -> None:
        channels, heads = retention_channels(config), config.heads

        def convolution(n: int) -> HeadsConvolution:
            taps = (RETENTION_TAPS, DILATION, named_key(key, f"conv{n}"))
            return HeadsConvolution(heads, channels[n], channels[n + 1], *taps, check=config.check)

        self.conv0, self.conv1, self.conv2 = (convolution(n) for n in range(3))
        deviation = (2 / channels[-1]) ** 0.5
        weight = jax.random.normal(named_key(key, "logit"), (heads, channels[-1]), jnp.float32)
        self.weight = nnx.Param(deviation * weight)
        self.bias = nnx.Param(jnp.full(heads, BIAS, jnp.float32), weight_decay=False)

    @staticmethod
    def init_state(config: ModelConfig, batch: int) -> tuple[ConvState, ...]:
        rows = (RETENTION_TAPS - 1) * DILATION + 1
        channels = retention_channels(config)[:-1]
        return tuple(conv.init_state(batch, config.heads * n, rows, config.compute_dtype) for n in channels)

    def __call__(
        self,
        k: Float[Array, "B T h K"],
        v: Float[Array, "B T H V"],
        segment_ids: Int[Array, "B T"] | None,
        state: tuple[ConvState, ...] | None,
        sequence_axis: str | None,
    ) -> tuple[Float[Array, "B T H"], tuple[ConvState, ...]]:
        batch, length, heads, _ = v.shape
        x = jnp.concatenate([jnp.repeat(k, heads // k.shape[2], axis=2), v], axis=-1).reshape(batch, length, -1)
        after = []
        for n, layer in enumerate((self.conv0, self.conv1, self.conv2)):
            before = None if state is None else state[n]
            x, kept = layer(x, segment_ids, before, sequence_axis=sequence_axis)
            after.append(kept)
        x = x.astype(jnp.float32).reshape(batch, length, heads, -1)
        return jnp.sum(x * self.weight[...], axis=-1) + self.bias[...], tuple(after)
