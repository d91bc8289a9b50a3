"""Gated linear attention (2312.06635): a state with a decay per key channel and plain writes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from hola_jax.array_types import Array, Float, Int
from hola_jax.config import ModelConfig
from hola_jax.layers.init import named_key
from hola_jax.layers.linear import Linear, LowRank
from hola_jax.layers.norm import GatedNorm
from hola_jax.memory import LinearState, init_linear_state, linear_memory

SLOWNESS = 16.0  # divides the log decay, so that states last


class GLA(nnx.Module):
    """S <- Diag(exp g) S + k v', g = logsigmoid(x W1 W2 + b) / 16; no convolution, no norm of q and k."""

    def __init__(self, config: ModelConfig, key: Array) -> None:
        keys, values = config.key_head_count * config.key_width, config.heads * config.value_width
        channels = config.heads * config.key_width
        self.config = config
        self.query = Linear(config.dim, keys, named_key(key, "query"))
        self.key = Linear(config.dim, keys, named_key(key, "key"))
        self.value = Linear(config.dim, values, named_key(key, "value"))
        self.decay = LowRank(config.dim, config.decay_rank, channels, named_key(key, "decay"), bias=True)
        self.gate = Linear(config.dim, values, named_key(key, "gate")) if config.output_gate else None
        self.norm = GatedNorm(config.value_width, config.norm_epsilon)
        self.output = Linear(values, config.dim, named_key(key, "output"))

    @staticmethod
    def init_state(config: ModelConfig, batch: int) -> LinearState:
        """What an empty prefix leaves."""
        return init_linear_state(batch, config.heads, config.key_width, config.value_width)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: LinearState | None = None,
        *,
        sequence_axis: str | None = None,
    ) -> tuple[Float[Array, "B T D"], LinearState]:
        config = self.config

        def heads(x: Array, count: int) -> Float[Array, "B T H K"]:
            return x.reshape(*x.shape[:2], count, -1)

        o, state = linear_memory(
            heads(self.query(x), config.key_head_count),
            heads(self.key(x), config.key_head_count),
            heads(self.value(x), config.heads),
            None,
            heads(jax.nn.log_sigmoid(self.decay(x, jnp.float32)) / SLOWNESS, config.heads),
            scale=config.key_width**-0.5,
            normalise=False,
            chunk=config.memory.chunk,
            scan=config.memory.scan,
            segment_ids=segment_ids,
            state=state,
            implementation=config.implementation,
            check=config.check,
            sequence_axis=sequence_axis,
        )
        y = self.norm(o, None if self.gate is None else heads(self.gate(x), config.heads))
        return self.output(y.reshape(*y.shape[:2], -1)), state
