"""What a platform's step does not take, known from the sizes: a reason, or nothing where it runs."""

from __future__ import annotations

import jax

from pallas_kernels.cache.limits import VMEM
from pallas_kernels.step.arrays import Sizes

ITEM = {"bfloat16": 2, "float32": 4}
WIDTHS = (64, 128, 256)
WINDOW = 512  # whose rows a GPU's shared memory holds, 64 columns at a time


def vmem_bytes(sizes: Sizes) -> int:
    """An upper estimate of what the TPU's kernel holds on the chip."""
    item, state, width = ITEM[sizes.dtype], 4 * sizes.key_dim * sizes.value_dim, sizes.key_dim + sizes.value_dim
    piped = 4 * state + 2 * item * (sizes.window + sizes.block) * width
    kept = 2 * state + item * (3 * sizes.block + 2 * sizes.window) * width
    return piped + kept + 4 * 4 * (sizes.window + sizes.block) * (sizes.window + sizes.block)


def tpu_refuses(sizes: Sizes, interpret: bool = False) -> str:
    """Why the TPU's cannot. In interpret mode only what has no cache is refused."""
    window, block = sizes.window, sizes.block
    if sizes.dtype not in ITEM:
        return f"v is {sizes.dtype}: the Pallas step takes bfloat16 or float32"
    if window < 1:
        return "window=0 keeps no cache: there is no kernel for it; use the XLA path"
    if interpret:
        return ""
    for name, size in (("K", sizes.key_dim), ("V", sizes.value_dim)):
        if size % 64:
            return f"{name}={size}: the Pallas step needs a multiple of 64; use the XLA path"
    if block % 128 or window % 16:
        return (
            f"block={block}, window={window}: the Pallas step needs a block of a multiple of 128 and a window of a multiple "
            "of 16; use the XLA path"
        )
    if (needed := vmem_bytes(sizes)) > VMEM:
        return (
            f"window={window}, block={block}, K={sizes.key_dim}, V={sizes.value_dim} need about {needed / 2**20:.1f} MiB on "
            f"the chip, which grants {VMEM / 2**20:.0f}; use a smaller window or block, or the XLA path"
        )
    return ""


def gpu_refuses(sizes: Sizes, energy: float | None = None) -> str:
    """Why the GPU's kernel cannot take a token of these sizes; empty where it can."""
    if energy is not None:
        return f"energy={energy}: the parts of the GPU step know no weights but their own; use the XLA path"
    if sizes.dtype != "bfloat16":
        return f"v is {sizes.dtype}: the GPU step takes a bfloat16 cache; use the XLA path"
    for name, size in (("K", sizes.key_dim), ("V", sizes.value_dim)):
        if size not in WIDTHS:
            return f"{name}={size}: the GPU step is made for {WIDTHS}; use the XLA path"
    for name, size, most in (("window", sizes.window, WINDOW), ("block", sizes.block, None)):
        if size < 1 or size % 64 or (most is not None and size > most):
            bound = "" if most is None else f" up to {most}"
            return f"{name}={size}: the GPU step needs a multiple of 64{bound}; use the XLA path"
    if jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__}: the GPU step is written for jax 0.11 and newer; upgrade jax or use the XLA path"
    return ""
