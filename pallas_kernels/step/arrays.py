"""What goes into a step and comes out, on any platform."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array


class Memory(NamedTuple):
    """All that is remembered of a prefix, as the library's state holds it."""

    fast_weights: Array  # [B, H, K, V] float32
    cache_keys: Array  # [B, H, W, K]
    cache_values: Array  # [B, H, W, V]
    cache_scores: Array  # [B, H, W] float32; -inf where a row is empty
    cache_positions: Array  # [B, H, W] int32; -1 where a row is empty
    block_keys: Array  # [B, h, C, K]
    block_values: Array  # [B, H, C, V]
    block_scores: Array  # [B, H, C] float32
    position: Array  # [B] int32
    document: Array  # [B] int32
    document_start: Array  # [B] int32


class Sizes(NamedTuple):
    """What decides whether a kernel takes a step."""

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    window: int
    block: int
    dtype: str  # of the cache and of v


def sizes(k: Array, v: Array, memory: Memory) -> Sizes:
    """Of a call."""
    (_, heads, value_dim), (_, key_heads, key_dim) = v.shape, k.shape
    window, block = memory.cache_scores.shape[2], memory.block_scores.shape[2]
    return Sizes(heads, key_heads, key_dim, value_dim, window, block, memory.cache_values.dtype.name)


def refuse(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array,
    memory: Memory,
    document: Array,
    score: str | Array,
    read: str,
) -> None:
    """ValueError where shapes do not fit together, NotImplementedError for what no kernel does."""
    if log_decay.ndim == 3:
        raise NotImplementedError("the Pallas step takes one decay per head, not one per key channel")
    if isinstance(score, str) and score not in ("surprise", "residual"):
        raise NotImplementedError(
            f'score={score!r} is not made on the chip: "surprise" and "residual" are; give others as an array [B, H]'
        )
    if read not in ("rmsnorm", "unit_l2"):
        raise NotImplementedError(f'read={read!r}: the Pallas step reads by "rmsnorm" or "unit_l2"')
    (batch, heads, value_dim), (key_heads, key_dim) = v.shape, k.shape[1:]
    window, block, dtype = memory.cache_scores.shape[2], memory.block_scores.shape[2], memory.cache_values.dtype
    rows = batch, heads, window
    shapes: dict[str, tuple[int, ...]] = {
        "q": (batch, key_heads, key_dim),
        "beta": (batch, heads),
        "log_decay": (batch, heads),
        "document": (batch,),
        "fast_weights": (batch, heads, key_dim, value_dim),
        "cache_keys": (*rows, key_dim),
        "cache_values": (*rows, value_dim),
        "cache_scores": rows,
        "cache_positions": rows,
        "block_keys": (batch, key_heads, block, key_dim),
        "block_values": (batch, heads, block, value_dim),
        "block_scores": (batch, heads, block),
        "position": (batch,),
        "document_start": (batch,),
    }
    given: dict[str, Any] = memory._asdict() | {"q": q, "beta": beta, "log_decay": log_decay, "document": document}
    for name, shape in shapes.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} is {given[name].shape}, want {shape} beside k {k.shape} and v {v.shape}")
    if heads % key_heads:
        raise ValueError(f"k has {key_heads} heads and v has {heads}; the key heads must divide the value heads")
    stored = (memory.cache_keys, memory.cache_values, memory.block_keys, memory.block_values, v)
    if dtype not in (jnp.bfloat16, jnp.float32) or any(x.dtype != dtype for x in stored):
        raise NotImplementedError(
            f"cache, block and v are {', '.join(str(x.dtype) for x in stored)}; the Pallas step takes bfloat16 or "
            "float32, one of them"
        )
