"""What the fused kernels cannot do, said by name before anything is compiled."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.cache.limits import DTYPES, VMEM
from pallas_kernels.hola.layout import Call


def vmem_bytes(call: Call, running: bool) -> int:
    """An upper estimate of what the larger of the two kernels, the backward one, holds on the chip."""
    keys, values, state = call.block * call.key_dim, call.block * call.value_dim, call.key_dim * call.value_dim
    width, item = call.key_dim + call.value_dim, jnp.dtype(call.dtype).itemsize
    by_key = item if call.group == 1 else 4
    tokens = item * (2 * keys + 3 * values) + by_key * 2 * keys
    rows = call.window * width * item
    piped = 2 * (tokens + 3 * 4 * state + 3 * rows + (2 * item * (keys + values) if running else 0))
    kept = 4 * (state + 2 * keys + values + call.window * width) + item * (2 * keys + values)
    chunks = 4 * (5 * keys + 2 * values + call.chunks * (state + 8 * call.chunk * call.chunk))
    tables = 4 * 3 * (call.block * min(call.block, 128) + call.window * (call.window + call.block))
    return piped + kept + chunks + tables


def refuse_sizes(call: Call, key_dim: int, value_dim: int, running: bool) -> None:
    """NotImplementedError where the kernel cannot run on a chip; in interpret mode only an empty cache is refused."""
    if call.window < 1:
        raise NotImplementedError("window=0 keeps no cache: use the delta rule's kernel, or the XLA path")
    if call.interpret:
        return
    for name, size in (("K", key_dim), ("V", value_dim)):
        if size % 64:
            raise NotImplementedError(f"{name}={size}: the TPU kernel needs a multiple of 64; use the XLA path")
    if call.block % 128 or call.window % 8:
        raise NotImplementedError(
            f"block={call.block}, window={call.window}: the TPU kernel needs a block of a multiple of 128 and a window "
            "of a multiple of 8; use the XLA path"
        )
    if (needed := vmem_bytes(call, running)) > VMEM:
        raise NotImplementedError(
            f"window={call.window}, block={call.block}, K={key_dim}, V={value_dim} in {jnp.dtype(call.dtype)} need about "
            f"{needed / 2**20:.1f} MiB on the chip, which grants {VMEM / 2**20:.0f}; use a smaller window or block, the "
            "delta rule's and the cache's own kernels, or the XLA path"
        )


__all__ = ["DTYPES", "refuse_sizes", "vmem_bytes"]
