"""LoLA (2505.23666): exact recent pairs, an exact cache of what is recalled worst, and linear attention for all the others.

Published as a way to run distilled Llamas; here it is a mixer that trains.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from hola_jax.array_types import Array, Float, Int
from hola_jax.config import ModelConfig
from hola_jax.layers.attention import rotate
from hola_jax.layers.init import named_key, normal
from hola_jax.layers.linear import Linear
from hola_jax.memory import LolaParams, LolaState, init_lola_state, lola_memory
from hola_jax.memory.linear import documents_of
from hola_jax.memory.lola import document_positions

MIX_LOGIT = -2.197  # of a weight of 0.1


class FeatureMap(nnx.Module):
    """W of phi(x) = [softmax(x W), softmax(-x W)], one for each head."""

    def __init__(self, config: ModelConfig, key: Array) -> None:
        self.kernel = nnx.Param(normal(key, config.heads, config.key_width, config.feature_dim))


class LoLA(nnx.Module):
    """Queries and keys are rotated by their position in the document, as the Transformer's are, and features are made of the
    rotated ones; no convolution, no decay, no gate."""

    def __init__(self, config: ModelConfig, key: Array) -> None:
        keys, values = config.heads * config.key_width, config.heads * config.value_width
        self.config = config
        self.query = Linear(config.dim, keys, named_key(key, "query"))
        self.key = Linear(config.dim, keys, named_key(key, "key"))
        self.value = Linear(config.dim, values, named_key(key, "value"))
        self.query_features = FeatureMap(config, named_key(key, "query_features"))
        self.key_features = FeatureMap(config, named_key(key, "key_features"))
        self.mix_logit = nnx.Param(jnp.full(config.heads, MIX_LOGIT, jnp.float32), weight_decay=False)
        self.output = Linear(values, config.dim, named_key(key, "output"))

    @staticmethod
    def init_state(config: ModelConfig, batch: int) -> LolaState:
        """What an empty prefix leaves."""
        sizes = (config.heads, config.key_width, config.value_width, config.feature_dim)
        return init_lola_state(config.memory, batch, *sizes, config.compute_dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: LolaState | None = None,
        *,
        sequence_axis: str | None = None,
    ) -> tuple[Float[Array, "B T D"], LolaState]:
        config = self.config
        before = self.init_state(config, x.shape[0]) if state is None else state
        positions = document_positions(documents_of(segment_ids, before.document, x.shape[1])[1], before)

        def heads(x: Array) -> Float[Array, "B T H K"]:
            return x.reshape(*x.shape[:2], config.heads, -1)

        o, state = lola_memory(
            rotate(heads(self.query(x)), positions, config.rope_theta),
            rotate(heads(self.key(x)), positions, config.rope_theta),
            heads(self.value(x)),
            LolaParams(self.query_features.kernel[...], self.key_features.kernel[...], self.mix_logit[...]),
            config=config.memory,
            segment_ids=segment_ids,
            state=state,
            implementation=config.implementation,
            check=config.check,
            sequence_axis=sequence_axis,
        )
        return self.output(o.reshape(*x.shape[:2], -1)), state
