"""What a language model is, as one flat frozen dataclass, and what that costs in parameters and operations.

A field that is None takes the default of its mixer; the properties below the fields give the value in force. Two models
differ in their mixer alone when their configurations differ in `mixer` alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import jax.numpy as jnp

from hola_jax.memory import MemoryConfig, lola
from hola_jax.memory.kernels import Implementation, Work

__all__ = ["MemoryConfig", "ModelConfig", "flops_per_token", "memory_work", "parameter_count", "unknown_name"]

Mixer = Literal["hola", "gated_deltanet", "deltanet", "kda", "gla", "gsa", "lola", "transformer"]
Remat = Literal["none", "full", "dots"]
DType = Literal["bfloat16", "float32"]
Residual = Literal["plain", "attention", "block_attention"]
Norm = Literal["pre", "sandwich", "dynamic_tanh"]
QKNorm = Literal["none", "heads", "input"]

RETENTION_TAPS = 3  # of a convolution of the net that makes the score "learned"
DELTA_MIXERS = ("hola", "gated_deltanet", "deltanet", "kda")  # those with a delta rule, a convolution and a norm over V


def unknown_name(what: str, given: object, allowed: Iterable[str]) -> ValueError:
    """The error for a name that is none of those allowed; it suggests the nearest."""
    names = list(allowed)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{what} is {given!r}; it must be one of {', '.join(names)}{hint}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A stack of blocks, each a mixer and an MLP.

    dim, layers           D, N
    heads, key_heads      H value heads; h key heads, which divide them (None: as many)
    key_dim, value_dim    K, V of one head; None is D / H, and for the keys of GLA half of that
    mixer                 what mixes the tokens
    memory                how "hola" remembers; "lola" uses its window and block, the other linear mixers its chunk and scan
    output_gate           whether the mixer's output is gated by a projection of its input
    conv_width            of the causal depthwise convolution on q, k and v of the delta-rule mixers
    negative_eigenvalues  beta in (0, 2) in place of (0, 1)
    gate_init, read_init  of HOLA, at the beginning: the gate's logit, and both scales of the sharp read
    slots, decay_rank     slots per head of GSA; rank of GLA's decay projection
    feature_dim           F, of LoLA's linear attention: features are a softmax over F numbers and one over their negatives
    mlp_dim               inner width of the SwiGLU; None is 8 D / 3, rounded up to a multiple of 256
    residual              how sub-layers are joined over depth (docs/depth.md): "plain" sums; "attention" reads all earlier
                          outputs, "block_attention" the sums of blocks of layers
    residual_blocks       of "block_attention", a divisor of N; None is the divisor nearest to 8
    norm                  around sub-layers: "pre", RMSNorm of what they read; "sandwich", of what they answer too;
                          "dynamic_tanh" in place of RMSNorm
    qk_norm               of the Transformer: "heads", RMSNorm of each head's queries and keys; "input", values are made of
                          what is read without the norm, so that queries and keys alone have it
    max_length            tokens that the Transformer's state can hold; every other state has a constant size
    dtype                 of activations; parameters are float32
    remat                 what the backward pass makes again: "none", "full" (all of a block), "dots" (all but matmuls)
    check                 also test what only values can tell (see `hola_memory`)
    implementation        of the mixer's memory (see `hola_memory`); None chooses by platform and shape
    """

    vocab_size: int = 32000
    dim: int
    layers: int
    heads: int
    key_heads: int | None = None
    key_dim: int | None = None
    value_dim: int | None = None
    mixer: Mixer = "hola"
    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    output_gate: bool = True
    conv_width: int = 4
    negative_eigenvalues: bool = False
    gate_init: float = -4.0
    read_init: float = 1.0
    slots: int = 64
    decay_rank: int = 16
    feature_dim: int = 64
    mlp_dim: int | None = None
    residual: Residual = "plain"
    residual_blocks: int | None = None
    norm: Norm = "pre"
    qk_norm: QKNorm = "none"
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-6
    rope_theta: float = 10000.0
    max_length: int = 2048
    dtype: DType = "bfloat16"
    remat: Remat = "none"
    check: bool = False
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.memory, MemoryConfig):
            raise TypeError(f"ModelConfig.memory is a {type(self.memory).__name__}; it must be a MemoryConfig")
        choices = {"mixer": Mixer, "dtype": DType, "remat": Remat, "residual": Residual}
        choices |= {"norm": Norm, "qk_norm": QKNorm}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise unknown_name(f"ModelConfig.{name}", getattr(self, name), get_args(allowed))
        if self.implementation is not None and self.implementation not in get_args(Implementation):
            names = ("None", *get_args(Implementation))
            raise unknown_name("ModelConfig.implementation", self.implementation, names)
        counts = (
            "vocab_size",
            "dim",
            "layers",
            "heads",
            "conv_width",
            "slots",
            "decay_rank",
            "feature_dim",
            "max_length",
        )
        optional = ("key_heads", "key_dim", "value_dim", "mlp_dim", "residual_blocks")
        for name in (*counts, *optional):
            value = getattr(self, name)
            if name in optional and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"ModelConfig.{name} is {value!r}; it must be an integer of at least 1")
        for name in ("gate_init", "read_init"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"ModelConfig.{name} is {getattr(self, name)!r}; it must be a finite number")
        self._check_heads()
        self._check_depth()

    def _check_depth(self) -> None:
        if self.qk_norm != "none" and self.mixer != "transformer":
            raise ValueError(
                f"ModelConfig.qk_norm={self.qk_norm!r} is of mixer 'transformer', and mixer is {self.mixer!r}: the others "
                "norm their keys themselves, or have no softmax over them"
            )
        blocks = self.residual_blocks
        if blocks is not None and self.residual != "block_attention":
            raise ValueError(
                f"ModelConfig.residual_blocks={blocks} is of residual='block_attention', and residual is {self.residual!r}"
            )
        if blocks is not None and self.layers % blocks:
            raise ValueError(
                f"ModelConfig.residual_blocks={blocks} does not divide layers={self.layers}; a block is whole layers"
            )

    def _check_heads(self) -> None:
        defaulted = self.key_dim is None or self.value_dim is None
        unit = 2 * self.heads if self.mixer == "gla" else self.heads
        if defaulted and self.dim % unit:
            raise ValueError(
                f"ModelConfig.dim={self.dim} is no multiple of {unit} ({self.heads} heads, mixer {self.mixer!r}); "
                "choose another dim or heads, or give key_dim and value_dim"
            )
        if self.heads % self.key_head_count:
            raise ValueError(f"ModelConfig.key_heads={self.key_heads} does not divide heads={self.heads}")
        if self.mixer in ("gsa", "lola") and self.key_head_count != self.heads:
            name = {"gsa": "GSA", "lola": "LoLA"}[self.mixer]
            raise ValueError(f"ModelConfig.key_heads={self.key_heads}: {name} has one key head per head, {self.heads}")
        if self.mixer in ("lola", "transformer") and self.key_width % 2:
            raise ValueError(f"ModelConfig.key_dim={self.key_width} is odd; rotary positions need pairs of channels")
        if self.mixer == "transformer" and self.key_width != self.value_width:
            raise ValueError(
                f"ModelConfig.value_dim={self.value_width} differs from key_dim={self.key_width}; "
                "jax.nn.dot_product_attention needs them equal"
            )

    @property
    def key_head_count(self) -> int:
        return self.heads if self.key_heads is None else self.key_heads

    @property
    def key_width(self) -> int:
        if self.key_dim is not None:
            return self.key_dim
        return self.dim // (2 * self.heads if self.mixer == "gla" else self.heads)

    @property
    def value_width(self) -> int:
        return self.dim // self.heads if self.value_dim is None else self.value_dim

    @property
    def mlp_width(self) -> int:
        return 256 * -(-int(8 * self.dim / 3) // 256) if self.mlp_dim is None else self.mlp_dim

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def nearest_divisor(number: int, wanted: float) -> int:
    """The divisor of `number` nearest to `wanted` in ratio."""
    divisors = (d for d in range(1, number + 1) if number % d == 0)
    return min(divisors, key=lambda d: abs(math.log(d / wanted)))


def residual_blocks(config: ModelConfig) -> int:
    """Blocks of "block_attention": as asked for, or about 8."""
    return nearest_divisor(config.layers, 8) if config.residual_blocks is None else config.residual_blocks


def residual_group(config: ModelConfig) -> int:
    """Layers whose readers over depth look at once at all that is before them: a block, or about sqrt(N)."""
    if config.residual == "block_attention":
        return config.layers // residual_blocks(config)
    return nearest_divisor(config.layers, config.layers**0.5)


def residual_sources(config: ModelConfig) -> list[int]:
    """How many sources each reader over depth sees, in the order of the sub-layers and then the last; [] where there are
    none."""
    if config.residual == "plain":
        return []
    block = 1 if config.residual == "attention" else 2 * config.layers // residual_blocks(config)
    within = [1 + number // block + (number % block > 0) for number in range(2 * config.layers)]
    return [*within, 1 + 2 * config.layers // block]


def retention_channels(config: ModelConfig) -> list[int]:
    """Of the net that makes the score "learned", for one head: [k; v], and what each convolution leaves of it."""
    return [max(1, (config.key_width + config.value_width) >> n) for n in range(4)]


def _mixer_parameters(config: ModelConfig) -> int:
    dim, heads, width, values = config.dim, config.heads, config.key_width, config.value_width
    keys, total = config.key_head_count * width, heads * values
    count = dim * (2 * keys + total) + total * dim  # q, k, v, output
    gate = dim * total if config.output_gate else 0
    if config.mixer == "transformer":
        return count + (2 * width if config.qk_norm == "heads" else 0)
    if config.mixer == "gsa":
        return count + dim * heads * config.slots + total
    if config.mixer == "lola":
        return count + 2 * heads * width * config.feature_dim + heads
    if config.mixer == "gla":
        rank = config.decay_rank
        return count + gate + values + dim * rank + (rank + 1) * heads * width
    count += config.conv_width * (2 * keys + total) + dim * heads + values  # convolutions, beta, norm
    if config.mixer == "kda":
        gate = values * (dim + total) + total if config.output_gate else 0
        return count + gate + values * (dim + heads * width) + heads + heads * width
    if config.mixer != "deltanet":
        count += dim * heads + 2 * heads  # decay
    if config.mixer == "hola":
        count += 2 * heads + (2 * width if config.memory.read == "rmsnorm" else heads)
        count += heads if config.memory.read_power else 0
        if config.memory.score == "learned":
            channels = retention_channels(config)
            inside = sum(RETENTION_TAPS * a * b for a, b in itertools.pairwise(channels))
            count += heads * (inside + channels[-1] + 1)
    return count + gate


def _norm_parameters(config: ModelConfig) -> int:
    each = 2 * config.dim + 1 if config.norm == "dynamic_tanh" else config.dim
    return ((4 if config.norm == "sandwich" else 2) * config.layers + 1) * each


def parameter_count(config: ModelConfig) -> dict[str, int]:
    """Trainable numbers by part, with "total" and "non_embedding" (what the names of the scales count)."""
    parts = {
        "embedding": config.vocab_size * config.dim,
        "mixer": config.layers * _mixer_parameters(config),
        "mlp": config.layers * 3 * config.dim * config.mlp_width,
        "norm": _norm_parameters(config),
        "residual": 2 * len(residual_sources(config)) * config.dim,
        "head": 0 if config.tie_embeddings else config.vocab_size * config.dim,
    }
    total = sum(parts.values())
    return {**parts, "total": total, "non_embedding": total - parts["embedding"] - parts["head"]}


def _memory_flops(config: ModelConfig, context: int) -> float:
    """Operations of one layer's memory for one token, as the chunked forms spend them."""
    heads, width, values = config.heads, config.key_width, config.value_width
    if config.mixer == "transformer":
        return heads * (width + values) * (context + 1)  # 2 operations, half of the context on average
    memory, chunk = config.memory, min(config.memory.chunk, context)
    exact = (
        2 * min(context, memory.window + (memory.block + 1) / 2) * (width + values)
    )  # a read of cache and running block
    if config.mixer == "lola":
        features, scored = 2 * config.feature_dim, 1 + memory.window / memory.block  # pairs scored, for one token
        of_keys = (scored - 1) * width * features  # what is made again: once is in the parameters' count
        return heads * (exact + of_keys + 2 * features * (values + 1) * (1 + 2 * scored))

    def linear(key_dim: int, value_dim: int, delta: bool) -> float:
        flops = 2 * chunk * (key_dim + value_dim) + 4 * key_dim * value_dim  # q k', its use; read and write of S
        if delta:
            flops += 2 * chunk * (key_dim + chunk + value_dim + key_dim) + 2 * key_dim * value_dim
        return flops

    if config.mixer == "gsa":
        return heads * (linear(width, config.slots, False) + linear(config.slots, values, False))
    flops = linear(width, values, config.mixer in DELTA_MIXERS)
    if config.mixer == "hola" and memory.write == "eviction":  # W + C pairs for each block; and S is read besides
        flops = (1 + memory.window / memory.block) * flops + 2 * width * values
    return heads * (flops + (exact if config.mixer == "hola" else 0))


def flops_per_token(config: ModelConfig, context: int) -> float:
    """Operations of a forward pass for one token of a sequence of `context` tokens; a training step is three times that."""
    if context < 1:
        raise ValueError(f"context is {context}; it must be at least 1")
    count = parameter_count(config)
    matmuls = count["mixer"] + count["mlp"] + config.vocab_size * config.dim
    over_depth = 4 * sum(residual_sources(config)) * config.dim  # a source's logit, and its share of what is read
    return 2.0 * matmuls + config.layers * _memory_flops(config, context) + over_depth


def memory_work(config: ModelConfig) -> Work | None:
    """What the mixer asks of its memory's kernels; None for the Transformer, which has no memory."""
    if config.mixer == "transformer":
        return None
    sizes = (config.heads, config.key_head_count, config.key_width, config.value_width, (config.dtype,) * 3)
    work = Work(*sizes, config.mixer in DELTA_MIXERS, config.mixer == "kda")
    if config.mixer == "lola":
        return work._replace(only_xla=lola.ONLY_XLA, rescored=lola.RESCORED)
    if config.mixer != "hola":
        return work
    memory = config.memory
    cache: dict[str, Any] = {"window": memory.window, "block": memory.block, "energy": memory.read_energy}
    return work._replace(**cache, only_xla=memory.only_xla, rescored=memory.rescored)
