"""What the cache kernels cannot do, said by name before anything is compiled."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.cache.arrays import Cache, Shape

VMEM = 16 * 2**20  # what a TPU's compiler grants a kernel unasked, v5e's; later chips grant as much or more
DTYPES = (jnp.bfloat16, jnp.float32)


def vmem_bytes(shape: Shape, itemsize: int) -> int:
    """An upper estimate of what the larger of the two kernels, the backward one, holds on the chip."""
    block, window, width = shape.block, shape.window, shape.key_dim + shape.value_dim
    piped = 2 * itemsize * (4 * block * width + 5 * window * width)  # two of each: one in use, one under way
    kept = 4 * width * (block + window)
    tables = 4 * 4 * (block * block // 2 + 2 * block * window)
    return piped + kept + tables


def refuse_arrays(queries: Array, keys: Array, values: Array, scores: Array, cache: Cache | None) -> None:
    """TypeError or ValueError where types or shapes do not fit together."""
    if keys.dtype not in DTYPES or values.dtype != keys.dtype:
        raise TypeError(
            f"keys are {keys.dtype} and values {values.dtype}; both must be bfloat16, or both float32: cast them"
        )
    if queries.dtype not in DTYPES:
        raise TypeError(f"queries are {queries.dtype}; they must be bfloat16 or float32")
    batch, length, heads, key_dim = queries.shape
    if keys.shape[:2] != (batch, length) or keys.shape[3] != key_dim or heads % keys.shape[2]:
        raise ValueError(f"keys are {keys.shape} beside queries {queries.shape}; [B, T, h, K], where h divides H")
    if values.shape[:3] != (batch, length, heads):
        raise ValueError(f"values are {values.shape} beside queries {queries.shape}; they must be [B, T, H, V]")
    if scores.shape != (batch, heads, length):
        raise ValueError(f"scores are {scores.shape}; they must be [B, H, T] = {(batch, heads, length)}")
    if cache is not None and (cache.keys.dtype != keys.dtype or cache.values.dtype != keys.dtype):
        raise TypeError(f"the cache holds {cache.keys.dtype} and {cache.values.dtype}, the tokens are {keys.dtype}")


def refuse_sizes(shape: Shape, itemsize: int, interpret: bool) -> None:
    """NotImplementedError where the kernel cannot run on a chip; in interpret mode only an empty cache is refused."""
    if shape.window < 1:
        raise NotImplementedError("window=0 keeps no cache: there is nothing for this kernel to do; use the XLA path")
    if interpret:
        return
    for name, size in (("K", shape.key_dim), ("V", shape.value_dim)):
        if size % 64:
            raise NotImplementedError(f"{name}={size}: the TPU kernel needs a multiple of 64; use the XLA path")
    if shape.block % 128 or shape.window % 8:
        raise NotImplementedError(
            f"block={shape.block}, window={shape.window}: the TPU kernel needs a block of a multiple of 128 and a window "
            "of a multiple of 8; use the XLA path"
        )
    if (needed := vmem_bytes(shape, itemsize)) > VMEM:
        raise NotImplementedError(
            f"window={shape.window}, block={shape.block}, K={shape.key_dim}, V={shape.value_dim} need about "
            f"{needed / 2**20:.1f} MiB on the chip, which grants {VMEM / 2**20:.0f}; use a smaller window or block, or "
            "the XLA path"
        )


def refuse_gradient(energy: float | None) -> None:
    """NotImplementedError where a gradient is asked of a read that drops entries."""
    if energy is not None:
        raise NotImplementedError(
            f"energy={energy}: a read that drops entries has no gradient in a kernel; use the XLA path, implementation='xla'"
        )
