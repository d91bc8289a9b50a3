"""What the GPU kernels cannot do, said by name before anything is compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.cache.gpu.tiles import ROWS

WIDTHS = (64, 128, 256)
WINDOW = 1024


def refuse(keys: Array, values: Array, window: int, block: int, energy: float | None) -> None:
    """NotImplementedError with the reason and what to do."""
    if energy is not None:
        raise NotImplementedError(
            f"energy={energy}: the GPU kernel weighs entries as it meets them, and which are dropped shows after the last; "
            "use the XLA path"
        )
    if keys.dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"keys are {keys.dtype}: the GPU kernel's tensor cores multiply bfloat16; cast queries, keys and values, or use "
            "the XLA path"
        )
    for name, size in (("K", keys.shape[3]), ("V", values.shape[3])):
        if size not in WIDTHS:
            raise NotImplementedError(f"{name}={size}: the GPU kernel is made for {WIDTHS}; use the XLA path")
    if block < 1 or block % ROWS:
        raise NotImplementedError(
            f"block={block}: the GPU kernel needs a multiple of {ROWS}; use another block or the XLA path"
        )
    if not 1 <= window <= WINDOW:
        raise NotImplementedError(
            f"window={window}: the GPU kernel keeps 1 to {WINDOW} rows, beyond which choosing them by comparing all pairs "
            "costs more than the read; use the XLA path"
        )
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"jax {jax.__version__}: the GPU kernels are written for jax 0.11 and newer; upgrade jax or use the XLA path"
        )
