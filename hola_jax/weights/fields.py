"""config.json to ModelConfig and back. Sizes come from the tensors' shapes; what config.json says is held against them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from hola_jax.config import MemoryConfig, ModelConfig, unknown_name
from hola_jax.weights.files import Stored
from hola_jax.weights.tables import FAMILIES, check_family

Fields = dict[str, Any]

# What other values of these mean cannot be expressed here.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attn": (None,),
    "conv_bias": (False,),
    "elementwise_affine": (True,),
    "hidden_act": ("swish", "silu"),
    "qk_norm": (False,),
    "qkv_bias": (False,),
    "rope_scaling": (None,),
    "use_short_conv": (True,),
    "window_size": (None,),
}
_WHOLE: tuple[str, ...] = (
    "hidden_size",
    "num_hidden_layers",
    "num_heads",
    "num_v_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
)
_WHOLE += ("vocab_size", "conv_size", "max_position_embeddings", "chunk_size")
_REAL = ("norm_eps", "expand_v", "rope_theta", "hidden_ratio")
_ARCHITECTURES = {"hola": "HOLA", "gated_deltanet": "GatedDeltaNet", "transformer": "Transformer"}
_MEMORY = {  # of config.json: of MemoryConfig
    "cache_window": "window",
    "cache_block": "block",
    "cache_score": "score",
    "cache_read": "read",
    "cache_seed": "seed",
    "cache_read_energy": "read_energy",
    "cache_write": "write",
    "cache_read_power": "read_power",
    "cache_fade": "fade",
    "cache_read_credit": "read_credit",
    "cache_same_key": "same_key",
    "cache_budget": "budget",
    "state_scale": "state_scale",
}
_NEEDED_MEMORY = ("cache_window", "cache_block", "cache_score", "cache_read")
_CHUNK = 64


def fields_of(config: ModelConfig) -> Fields:
    """What of a configuration has a meaning in config.json, for a mixer that has a table."""
    check_family(config.mixer)
    fields: Fields = {
        "model_type": FAMILIES[config.mixer],
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "vocab_size": config.vocab_size,
        "intermediate_size": config.mlp_width,
        "norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length,
    }
    if config.mixer == "transformer":
        return {
            **fields,
            "num_heads": config.heads,
            "num_kv_heads": config.key_head_count,
            "rope_theta": config.rope_theta,
        }
    fields |= {
        "num_heads": config.key_head_count,
        "num_v_heads": config.heads,
        "head_dim": config.key_width,
        "expand_v": _expansion(config.key_width, config.value_width),
        "use_gate": config.output_gate,
        "conv_size": config.conv_width,
        "allow_neg_eigval": config.negative_eigenvalues,
        "chunk_size": config.memory.chunk,
    }
    if config.mixer == "hola":
        fields |= {name: getattr(config.memory, ours) for name, ours in _MEMORY.items()}
    return fields


def _expansion(key_dim: int, value_dim: int) -> float:
    """V / K such that int(K * it) is V again."""
    ratio = value_dim / key_dim
    return ratio if int(key_dim * ratio) == value_dim else math.nextafter(ratio, math.inf)


def hugging_face(config: ModelConfig) -> Fields:
    """config.json for a model, with the constants that readers of such files expect."""
    check_exportable(config)
    constants: Fields = {
        "architectures": [_ARCHITECTURES[config.mixer] + "ForCausalLM"],
        "torch_dtype": config.dtype,
        "hidden_act": "swish",
        "hidden_ratio": 4,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if config.mixer == "transformer":
        constants |= {"qkv_bias": False, "qk_norm": False, "window_size": None}
    else:
        constants |= {"attn_mode": "chunk", "attn": None, "use_short_conv": True}
    return {**fields_of(config), **constants}


def check_exportable(config: ModelConfig) -> None:
    """Raises for a model that a folder in flash-linear-attention's layout cannot describe."""
    check_family(config.mixer)
    for name, only in (("residual", "plain"), ("norm", "pre"), ("qk_norm", "none")):
        if (value := getattr(config, name)) != only:
            raise NotImplementedError(
                f"{name}={value!r}: flash-linear-attention's layout has no place for its parameters; only {only!r} can be "
                "written so, and a run's own folder keeps every model"
            )
    if config.mixer == "transformer" and config.heads * config.key_width != config.dim:
        raise NotImplementedError(
            f"key_dim={config.key_width} with {config.heads} heads: the Transformer's layout has no head width of its own, "
            f"it takes dim / heads, {config.dim} / {config.heads}"
        )


def mixer_of(said: Mapping[str, Any], where: object) -> str:
    """The mixer that config.json names."""
    model_type = said.get("model_type")
    mixers = {family: mixer for mixer, family in FAMILIES.items()}
    if model_type not in mixers:
        raise unknown_name(f"model_type of {where}", model_type, mixers)
    return mixers[model_type]


def check_expressible(said: Mapping[str, Any], where: object) -> None:
    """Raises where config.json asks for what no model here does, or for nonsense."""
    for names, kind, what in ((_WHOLE, int, "an integer"), (_REAL, (int, float), "a number")):
        for name in names:
            value = said.get(name)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 2**31):
                raise ValueError(f"{where} says {name}={value!r}; it must be {what} above 0")
    wrong = [
        f"{name}={said[name]!r} (only {' or '.join(map(repr, allowed))})"
        for name, allowed in _ONLY.items()
        if name in said and said[name] not in allowed
    ]
    if wrong:
        raise NotImplementedError(f"{where} asks for what no model here does: {'; '.join(wrong)}")


class Shapes:
    """The tensors of a folder by their keys in our tables, asked for sizes."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self.tensors = tensors

    def size(self, key: str, axis: int = 0) -> int | None:
        found = self.tensors.get(key.replace("{i}", "0"))
        return None if found is None or not -len(found.shape) <= axis < len(found.shape) else found.shape[axis]

    def in_layer(self, key: str, axis: int = 0) -> int | None:
        return self.size(f"model.layers.0.{key}", axis)

    @property
    def layers(self) -> int:
        """Numbers 0, 1, ... that follow on each other."""
        found = {
            int(key.split(".")[2]) for key in self.tensors if key.startswith("model.layers.") and key[13:14].isdigit()
        }
        return next(number for number in range(len(found) + 1) if number not in found)


def config_of(said: Mapping[str, Any], tensors: Mapping[str, Stored], where: object) -> tuple[ModelConfig, list[str]]:
    """The configuration that the shapes and config.json give, and a line for each field on which they disagree."""
    mixer = mixer_of(said, where)
    check_expressible(said, where)
    shapes = Shapes(tensors)
    if not shapes.layers:
        raise ValueError(
            f"no key beside {where} begins with model.layers.0; is it of another family, or are aliases needed?"
        )

    def needed(name: str, inferred: int | None) -> Any:
        """From the shapes; where the key is missing, which is said later, from config.json."""
        value = inferred if inferred is not None else said.get(name)
        if value is None:
            raise ValueError(f"{where} does not say {name}, and no tensor tells it")
        return value

    fields: Fields = {
        "mixer": mixer,
        "vocab_size": needed("vocab_size", shapes.size("model.embeddings.weight")),
        "dim": needed("hidden_size", shapes.size("model.embeddings.weight", 1)),
        "layers": shapes.layers,
        "mlp_dim": needed("intermediate_size", shapes.in_layer("mlp.gate_proj.weight")),
        "tie_embeddings": "lm_head.weight" not in tensors,
        "norm_epsilon": said.get("norm_eps", 1e-6),
        "max_length": said.get("max_position_embeddings") or 2048,
        "dtype": "float32" if said.get("dtype", said.get("torch_dtype")) == "float32" else "bfloat16",
    }
    fields |= (_transformer if mixer == "transformer" else _delta)(said, shapes, needed, where)
    if mixer == "hola":
        fields["memory"] = _memory(said, where)
    config = ModelConfig(**fields)
    return config, disagreements(said, config)


Needed = Callable[[str, int | None], Any]


def _transformer(said: Mapping[str, Any], shapes: Shapes, needed: Needed, where: object) -> Fields:
    heads = needed("num_heads", None)
    width = needed("hidden_size", shapes.in_layer("attn.q_proj.weight")) // heads
    rows = shapes.in_layer("attn.k_proj.weight")
    key_heads = said.get("num_kv_heads") or heads if rows is None else _quotient(rows, width, "attn.k_proj", where)
    sizes = {"heads": heads, "key_heads": key_heads, "key_dim": width, "value_dim": width}
    return {**sizes, "rope_theta": said.get("rope_theta") or 10000.0}


def _delta(said: Mapping[str, Any], shapes: Shapes, needed: Needed, where: object) -> Fields:
    channels = shapes.in_layer("attn.q_proj.weight")
    width = shapes.in_layer("attn.cache_q_norm.weight", -1) or said.get("head_dim")
    if width is None:
        key_heads = needed("num_heads", None)
        width = _quotient(needed("head_dim", channels), key_heads, "attn.q_proj", where)
    elif channels is None:
        key_heads = needed("num_heads", None)
    else:
        key_heads = _quotient(channels, width, "attn.q_proj", where)
    heads = needed("num_heads" if said.get("num_v_heads") is None else "num_v_heads", shapes.in_layer("attn.A_log"))
    values = shapes.in_layer("attn.o_norm.weight")
    fields: Fields = {
        "heads": heads,
        "key_heads": key_heads,
        "key_dim": width,
        "value_dim": int(width * needed("expand_v", None)) if values is None else values,
        "output_gate": shapes.in_layer("attn.g_proj.weight") is not None,
        "conv_width": needed("conv_size", shapes.in_layer("attn.q_conv1d.weight", -1)),
        "negative_eigenvalues": bool(said.get("allow_neg_eigval", False)),
    }
    if said.get("chunk_size"):
        fields["memory"] = MemoryConfig(block=said["chunk_size"], chunk=said["chunk_size"])
    return fields


def _quotient(channels: int, by: int, key: str, where: object) -> int:
    if by < 1 or channels % by:
        raise ValueError(
            f"{key}.weight has {channels} channels, which {by} of {where} (heads or head width) does not divide"
        )
    return channels // by


def _memory(said: Mapping[str, Any], where: object) -> MemoryConfig:
    missing = [name for name in _NEEDED_MEMORY if name not in said]
    if missing:
        raise ValueError(
            f"{where} does not say {', '.join(missing)}, which no tensor tells; give them in a file of aliases, "
            "under [config]"
        )
    block = said["cache_block"]
    whole = isinstance(block, int) and block > 0
    chunk = max(c for c in range(1, _CHUNK + 1) if block % c == 0) if whole else 1
    values = {ours: said[name] for name, ours in _MEMORY.items() if name in said}
    return MemoryConfig(**values, chunk=said.get("chunk_size", chunk))


def disagreements(said: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """A line for each field of config.json that is not what the tensors say."""
    found = fields_of(config)
    said = dict(said)
    if said.get("intermediate_size") is None and said.get("hidden_ratio"):
        width = int(said.get("hidden_size", config.dim) * said["hidden_ratio"] * 2 / 3)
        said["intermediate_size"] = 256 * -(-width // 256)
    for name, other in (("num_v_heads", "num_heads"), ("num_kv_heads", "num_heads")):
        if name in found and said.get(name) is None:
            said[name] = said.get(other)

    def differ(name: str) -> bool:
        if name == "expand_v":
            return not math.isclose(said[name], found[name], rel_tol=1e-5)
        return bool(said[name] != found[name])

    given = [name for name in found if said.get(name) is not None]
    return [f"config.json says {name}={said[name]!r}, the tensors {found[name]!r}" for name in given if differ(name)]
