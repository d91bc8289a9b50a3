"""What the fused kernels cannot do, said by name before anything is compiled."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels.cache.limits import DTYPES, VMEM
from pallas_kernels.hola.layout import Call


def vmem_bytes(call: Call, running: bool) -> int:
    """An upper estimate of what the larger of the two kernels, the backward one, holds on the chip. What float32 adds, where
    exact products take their operands apart, is what compiling for a v5e showed."""
    keys, values, state = call.block * call.key_dim, call.block * call.value_dim, call.key_dim * call.value_dim
    width, item = call.key_dim + call.value_dim, jnp.dtype(call.dtype).itemsize
    by_key, square = item if call.group == 1 else 4, call.chunk * max(call.chunk, 128)
    tokens = item * (2 * keys + 3 * values) + by_key * 2 * keys
    earlier = item * (2 * keys + 2 * values) if running else 0
    piped = 2 * (tokens + 3 * 4 * state + 3 * item * call.window * width) + earlier
    kept = 4 * ((1 + call.chunks) * state + 2 * keys + 2 * values + call.window * width + call.chunks * square)
    kept += item * (2 * keys + values)
    split = 20 * (keys + values) + (16 * keys if call.group > 1 else 0) if item == 4 else 0
    made = split + 4 * call.run * (call.chunk * (7 * call.key_dim + 5 * call.value_dim) + 10 * square)
    tables = 4 * 6 * min(call.block, 128) * (call.block + call.window)
    tables += (4 if item == 2 else 12) * call.window * (call.window + call.block)
    return piped + kept + made + tables


def too_large(call: Call, key_dim: int, value_dim: int, running: bool) -> str | None:
    """Why the kernel cannot run on a chip, or None; in interpret mode only an empty cache is refused."""
    if call.window < 1:
        return "window=0 keeps no cache: use the delta rule's kernel, or the XLA path"
    if call.interpret:
        return None
    for name, size in (("K", key_dim), ("V", value_dim)):
        if size % 64:
            return f"{name}={size}: the TPU kernel needs a multiple of 64; use the XLA path"
    if call.block % 128 or call.window % 8:
        return (
            f"block={call.block}, window={call.window}: the TPU kernel needs a block of a multiple of 128 and a window "
            "of a multiple of 8; use the XLA path"
        )
    if (needed := vmem_bytes(call, running)) > VMEM:
        return (
            f"window={call.window}, block={call.block}, K={key_dim}, V={value_dim} in {jnp.dtype(call.dtype)} need about "
            f"{needed / 2**20:.1f} MiB on the chip, which grants {VMEM / 2**20:.0f}; use a smaller window or block, the "
            "delta rule's and the cache's own kernels, or the XLA path"
        )
    return None


def unlike(dtypes: tuple[Any, Any, Any]) -> str | None:
    """Why these types of q, k and v are not taken, or None."""
    of_q, of_k, of_v = (jnp.dtype(x) for x in dtypes)
    if of_q == of_k == of_v and of_v in DTYPES:
        return None
    return f"q, k and v are {of_q}, {of_k} and {of_v}; the Pallas memory takes bfloat16 or float32, one of them"


__all__ = ["too_large", "unlike", "vmem_bytes"]
