"""The mixers whose state follows the delta rule. HOLA and KDA are Gated DeltaNet with another memory or another decay."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hola_jax.array_types import Array, Float, Int
from hola_jax.config import ModelConfig
from hola_jax.layers import conv
from hola_jax.layers.conv import ConvState, ShortConvolution
from hola_jax.layers.decay import HeadDecay, NoDecay
from hola_jax.layers.init import named_key
from hola_jax.layers.linear import Linear
from hola_jax.layers.norm import GatedNorm
from hola_jax.memory import init_linear_state, linear_memory


class DeltaState(NamedTuple):
    """What the layer remembers of a prefix."""

    query: ConvState
    key: ConvState
    value: ConvState
    memory: Any  # LinearState or MemoryState


class GatedDeltaNet(nnx.Module):
    """q, k, v by projection, convolution and SiLU; a delta-rule memory; a gated norm; a projection back to D."""

    decay_type: ClassVar[Any] = HeadDecay

    def __init__(self, config: ModelConfig, key: Array) -> None:
        keys, values = config.key_head_count * config.key_width, config.heads * config.value_width

        def convolution(channels: int, name: str) -> ShortConvolution:
            return ShortConvolution(channels, config.conv_width, named_key(key, name), check=config.check)

        self.config = config
        self.query = Linear(config.dim, keys, named_key(key, "query"))
        self.key = Linear(config.dim, keys, named_key(key, "key"))
        self.value = Linear(config.dim, values, named_key(key, "value"))
        self.query_conv = convolution(keys, "query_conv")
        self.key_conv = convolution(keys, "key_conv")
        self.value_conv = convolution(values, "value_conv")
        self.beta = Linear(config.dim, config.heads, named_key(key, "beta"))
        self.decay = self.decay_type(config, named_key(key, "decay"))
        self.gate = self.make_gate(config, named_key(key, "gate")) if config.output_gate else None
        self.norm = self.make_norm(config)
        self.output = Linear(values, config.dim, named_key(key, "output"))

    def make_gate(self, config: ModelConfig, key: Array) -> nnx.Module:
        return Linear(config.dim, config.heads * config.value_width, key)

    def make_norm(self, config: ModelConfig) -> GatedNorm:
        return GatedNorm(config.value_width, config.norm_epsilon)

    def remember(
        self, q: Array, k: Array, v: Array, beta: Array, log_decay: Array, **context: Any
    ) -> tuple[Float[Array, "B T H V"], Any]:
        """What the memory answers, and the memory afterwards."""
        memory = self.config.memory
        return linear_memory(
            q, k, v, beta, log_decay, scale=q.shape[-1] ** -0.5, chunk=memory.chunk, scan=memory.scan, **context
        )

    @staticmethod
    def init_memory(config: ModelConfig, batch: int) -> Any:
        return init_linear_state(batch, config.heads, config.key_width, config.value_width)

    @classmethod
    def init_state(cls, config: ModelConfig, batch: int) -> DeltaState:
        """What an empty prefix leaves."""
        keys, values = config.key_head_count * config.key_width, config.heads * config.value_width

        def empty(channels: int) -> ConvState:
            return conv.init_state(batch, channels, config.conv_width, config.compute_dtype)

        return DeltaState(empty(keys), empty(keys), empty(values), cls.init_memory(config, batch))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: DeltaState | None = None,
        *,
        sequence_axis: str | None = None,
    ) -> tuple[Float[Array, "B T D"], DeltaState]:
        query, key, value, memory = (None, None, None, None) if state is None else state
        q, query = self.query_conv(self.query(x), segment_ids, query, sequence_axis=sequence_axis)
        k, key = self.key_conv(self.key(x), segment_ids, key, sequence_axis=sequence_axis)
        v, value = self.value_conv(self.value(x), segment_ids, value, sequence_axis=sequence_axis)
        beta = jax.nn.sigmoid(self.beta(x, jnp.float32))
        if self.config.negative_eigenvalues:
            beta = 2 * beta

        def heads(x: Array, count: int) -> Float[Array, "B T H K"]:
            return x.reshape(*x.shape[:2], count, -1)

        o, memory = self.remember(
            heads(q, self.config.key_head_count),
            heads(k, self.config.key_head_count),
            heads(v, self.config.heads),
            beta,
            self.decay(x),
            segment_ids=segment_ids,
            state=memory,
            implementation=self.config.implementation,
            check=self.config.check,
            sequence_axis=sequence_axis,
        )
        gate = None if self.gate is None else heads(self.gate(x), self.config.heads)
        y = self.norm(o, gate)
        return self.output(y.reshape(*y.shape[:2], -1)), DeltaState(query, key, value, memory)


class DeltaNet(GatedDeltaNet):
    """Gated DeltaNet that never forgets: g = 0."""

    decay_type = NoDecay
