"""Which tensor of a Hugging Face folder is which parameter here: one table per family, in flash-linear-attention's names.

What HOLA adds to Gated DeltaNet has no published names; those below are ours, and `aliases.py` reads others.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hola_jax.config import ModelConfig
from hola_jax.model import LanguageModel, Params

FAMILIES = {"hola": "hola", "gated_deltanet": "gated_deltanet", "transformer": "transformer"}  # mixer: model_type
LAYER = "model.layers.{i}."


class Row(NamedTuple):
    """A tensor there, and the parameter it is here."""

    key: str  # "{i}" stands for the number of the layer
    path: str  # in the nested dict of parameters; those of a layer are stacked over layers
    layout: Literal["same", "transposed", "conv"] = "same"


def _linear(key: str, path: str) -> Row:
    return Row(f"{LAYER}{key}.weight", f"blocks.{path}.kernel", "transposed")


_ATTENTION = [
    _linear("attn.q_proj", "mixer.query"),
    _linear("attn.k_proj", "mixer.key"),
    _linear("attn.v_proj", "mixer.value"),
    _linear("attn.o_proj", "mixer.output"),
]
_GATE = _linear("attn.g_proj", "mixer.gate")
_DELTA = [
    *_ATTENTION,
    Row(f"{LAYER}attn.q_conv1d.weight", "blocks.mixer.query_conv.kernel", "conv"),
    Row(f"{LAYER}attn.k_conv1d.weight", "blocks.mixer.key_conv.kernel", "conv"),
    Row(f"{LAYER}attn.v_conv1d.weight", "blocks.mixer.value_conv.kernel", "conv"),
    _linear("attn.b_proj", "mixer.beta"),
    _linear("attn.a_proj", "mixer.decay.projection"),
    Row(f"{LAYER}attn.A_log", "blocks.mixer.decay.A_log"),
    Row(f"{LAYER}attn.dt_bias", "blocks.mixer.decay.dt_bias"),
    Row(f"{LAYER}attn.o_norm.weight", "blocks.mixer.norm.scale"),
]
_CACHE = [
    Row(f"{LAYER}attn.cache_sink", "blocks.mixer.cache.sink_logit"),
    Row(f"{LAYER}attn.cache_gate", "blocks.mixer.cache.gate_logit"),
]
_SHARP_READ = [
    Row(f"{LAYER}attn.cache_q_norm.weight", "blocks.mixer.cache.query_scale"),
    Row(f"{LAYER}attn.cache_k_norm.weight", "blocks.mixer.cache.key_scale"),
]
_UNIT_READ = [Row(f"{LAYER}attn.cache_temperature", "blocks.mixer.cache.temperature")]
_POWER = [Row(f"{LAYER}attn.cache_power", "blocks.mixer.cache.power")]
_BLOCK = [
    Row(f"{LAYER}attn_norm.weight", "blocks.mixer_norm.scale"),
    Row(f"{LAYER}mlp_norm.weight", "blocks.mlp_norm.scale"),
    _linear("mlp.gate_proj", "mlp.gate"),
    _linear("mlp.up_proj", "mlp.up"),
    _linear("mlp.down_proj", "mlp.down"),
]
_ENDS = [Row("model.embeddings.weight", "embedding"), Row("model.norm.weight", "norm.scale")]
_HEAD = Row("lm_head.weight", "unembedding.kernel", "transposed")


def check_family(mixer: str) -> None:
    """Raises for a mixer that no table is for."""
    if mixer not in FAMILIES:
        raise NotImplementedError(
            f"mixer {mixer!r} has no table of Hugging Face keys; those that have one are {', '.join(FAMILIES)}"
        )


def rows(config: ModelConfig) -> list[Row]:
    """The table of a model."""
    check_family(config.mixer)
    table = [*_ENDS, *([] if config.tie_embeddings else [_HEAD]), *_BLOCK]
    if config.mixer == "transformer":
        return [*table, *_ATTENTION]
    table += [*_DELTA, *([_GATE] if config.output_gate else [])]
    if config.mixer == "hola":
        if config.memory.score == "learned":
            raise NotImplementedError(
                "score 'learned' has no Hugging Face keys for its net of convolutions; keep such a model as a run folder"
            )
        table += [*_CACHE, *(_SHARP_READ if config.memory.read == "rmsnorm" else _UNIT_READ)]
        table += _POWER if config.memory.read_power else []
    return table


def known_keys() -> set[str]:
    """Every key that some table has."""
    return {row.key for row in [*_ENDS, _HEAD, *_BLOCK, *_DELTA, _GATE, *_CACHE, *_SHARP_READ, *_UNIT_READ, *_POWER]}


@cache
def abstract_params(config: ModelConfig) -> Params:
    """Shapes and types of a model's parameters, as `functional(model)` gives them."""
    params: Params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: LanguageModel(config))))
    return params


def at(params: Params, path: str) -> Any:
    """params["a"]["b"] for "a.b"."""
    found: Any = params
    for name in path.split("."):
        found = found[name]
    return found


def theirs(row: Row, x: np.ndarray) -> np.ndarray:
    """A parameter of one layer, as it is laid out there."""
    return x if row.layout == "same" else x.T if row.layout == "transposed" else x.T[:, None]


def ours(row: Row, x: np.ndarray) -> np.ndarray:
    """A tensor of theirs, as it is laid out here. A vector may come with axes of length one, such as a head's."""
    if row.layout == "same":
        return x.reshape([n for n in x.shape if n > 1] or [1]) if row.key in _VECTORS else x
    return x.T if row.layout == "transposed" else x[:, 0].T


_VECTORS = {row.key for row in [*_CACHE, *_SHARP_READ, *_UNIT_READ, *_POWER]}


def shape_there(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape there of a parameter that has `shape` here, in one layer."""
    return theirs(row, np.broadcast_to(np.int8(0), shape)).shape


def as_stored(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A file's shape as `shape_there` would give it."""
    return tuple(n for n in shape if n > 1) or (1,) if row.key in _VECTORS else shape


def cast(params: Params, dtype: str | None) -> Params:
    """The parameters with matrices of type `dtype` and vectors of float32; as they are where it is None."""

    def one(path: tuple[Any, ...], x: Any) -> Any:
        kind = kept_type(dtype, x, jax.tree_util.keystr(path[:1], simple=True) == "blocks")
        return x if x.dtype == kind else x.astype(kind)

    found: Params = jax.tree.map_with_path(one, params)
    return found


def kept_type(dtype: str | None, x: Any, layers_axis: bool) -> jnp.dtype:
    """The type of a parameter where matrices are to be `dtype`: vectors stay float32, which decays and norms need."""
    if dtype is None:
        return jnp.dtype(x.dtype)
    return jnp.dtype(dtype if x.ndim - layers_axis > 1 else "float32")
