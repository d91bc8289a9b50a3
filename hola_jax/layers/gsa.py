"""Gated slot attention (2409.07146): a few slots per head that forget, written and read through a softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from hola_jax.array_types import Array, Float, Int
from hola_jax.config import ModelConfig
from hola_jax.layers.init import named_key
from hola_jax.layers.linear import Linear
from hola_jax.layers.norm import RMSNorm
from hola_jax.memory import SlotState, init_slot_state, slot_memory

SLOWNESS = 8.0  # divides the log forget gate, so that slots last


class GSA(nnx.Module):
    """SiLU on q, k, v; a forget gate per slot; the answer through SiLU and a norm over all heads."""

    def __init__(self, config: ModelConfig, key: Array) -> None:
        keys, values = config.heads * config.key_width, config.heads * config.value_width
        self.config = config
        self.query = Linear(config.dim, keys, named_key(key, "query"))
        self.key = Linear(config.dim, keys, named_key(key, "key"))
        self.value = Linear(config.dim, values, named_key(key, "value"))
        self.forget = Linear(config.dim, config.heads * config.slots, named_key(key, "forget"))
        self.norm = RMSNorm(values, config.norm_epsilon)
        self.output = Linear(values, config.dim, named_key(key, "output"))

    @staticmethod
    def init_state(config: ModelConfig, batch: int) -> SlotState:
        """What an empty prefix leaves."""
        return init_slot_state(batch, config.heads, config.slots, config.key_width, config.value_width)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: SlotState | None = None,
        *,
        sequence_axis: str | None = None,
    ) -> tuple[Float[Array, "B T D"], SlotState]:
        config = self.config

        def heads(x: Array) -> Float[Array, "B T H K"]:
            return x.reshape(*x.shape[:2], config.heads, -1)

        o, state = slot_memory(
            heads(jax.nn.silu(self.query(x))),
            heads(jax.nn.silu(self.key(x))),
            heads(jax.nn.silu(self.value(x))),
            heads(jax.nn.log_sigmoid(self.forget(x, jnp.float32)) / SLOWNESS),
            chunk=config.memory.chunk,
            segment_ids=segment_ids,
            state=state,
            implementation=config.implementation,
            check=config.check,
            sequence_axis=sequence_axis,
        )
        return self.output(self.norm(jax.nn.silu(o).reshape(*x.shape[:2], -1))), state
