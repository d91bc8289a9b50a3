"""HOLA: Gated DeltaNet whose memory has an exact cache beside the state."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from hola_jax.array_types import Array, Float
from hola_jax.config import ModelConfig
from hola_jax.layers.gated_delta_net import GatedDeltaNet
from hola_jax.layers.init import named_key
from hola_jax.layers.retention import Retention
from hola_jax.memory import CacheParams, MemoryState, hola_memory, init_state


class ExactCache(nnx.Module):
    """What the cache and its read learn; none of it is decayed."""

    def __init__(self, config: ModelConfig) -> None:
        def param(value: float, size: int) -> nnx.Param[Array]:
            return nnx.Param(jnp.full(size, value, jnp.float32), weight_decay=False)

        sharp = config.memory.read == "rmsnorm"
        self.query_scale = param(config.read_init, config.key_width) if sharp else None
        self.key_scale = param(config.read_init, config.key_width) if sharp else None
        self.temperature = None if sharp else param(1.0, config.heads)
        self.power = param(0.0, config.heads) if config.memory.read_power else None
        self.sink_logit = param(0.0, config.heads)
        self.gate_logit = param(config.gate_init, config.heads)

    def params(self) -> CacheParams:
        def value(param: nnx.Param[Array] | None) -> Array | None:
            return None if param is None else param[...]

        return CacheParams(
            query_scale=value(self.query_scale),
            key_scale=value(self.key_scale),
            sink_logit=self.sink_logit[...],
            gate_logit=self.gate_logit[...],
            temperature=value(self.temperature),
            power=value(self.power),
        )


class HOLA(GatedDeltaNet):
    """The mixer of the paper."""

    def __init__(self, config: ModelConfig, key: Array) -> None:
        super().__init__(config, key)
        self.cache = ExactCache(config)
        learned = config.memory.score == "learned"
        self.retention = Retention(config, named_key(key, "retention")) if learned else None

    def remember(
        self, q: Array, k: Array, v: Array, beta: Array, log_decay: Array, **context: Any
    ) -> tuple[Float[Array, "B T H V"], MemoryState]:
        given = (q, k, v, beta, log_decay, self.cache.params())
        if self.retention is None:
            return hola_memory(*given, config=self.config.memory, **context)
        state, of_tokens = context["state"], (context["segment_ids"], context["sequence_axis"])
        before = None if state is None else state.scorer
        scores, after = self.retention(k, v, of_tokens[0], before, of_tokens[1])
        out, memory = hola_memory(*given, config=self.config.memory, learned=scores, **context)
        return out, dataclasses.replace(memory, scorer=after)

    @staticmethod
    def init_memory(config: ModelConfig, batch: int) -> MemoryState:
        sizes = (config.heads, config.key_width, config.value_width, config.compute_dtype)
        state = init_state(config.memory, batch, *sizes, key_heads=config.key_head_count)
        learned = config.memory.score == "learned"
        return dataclasses.replace(state, scorer=Retention.init_state(config, batch)) if learned else state
