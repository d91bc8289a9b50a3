"""What the look over depth does not take, known from the sizes: a reason, or nothing where it runs."""

from __future__ import annotations

from collections.abc import Callable

from pallas_kernels.cache.limits import VMEM

ITEM = {"bfloat16": 2, "float32": 4}
LANES = 128
TILES = (512, 256, 128)  # tokens of a grid step


def look_bytes(readers: int, tile: int, dim: int, item: int) -> int:
    """An upper estimate of what the larger of a look's two kernels holds on the chip."""
    numbers = 2 * 4 * readers * tile * LANES
    forward = tile * dim * (2 * item + readers * (4 + 2 * item))
    backward = tile * dim * item * (6 + 2 * readers) + 8 * 4 * readers * dim
    return numbers + max(forward, backward)


def join_bytes(own: int, tile: int, dim: int, item: int) -> int:
    """The same of the kernel of a join with so many sources of the reader's own."""
    return 4 * 4 * tile * LANES + tile * dim * item * (6 + 4 * own) + 8 * 4 * dim


def tile_of(tokens: int, held: Callable[[int], int]) -> int | None:
    """Tokens of a grid step: as many as divide them and fit on the chip. `held` are the bytes of so many."""
    return next((tile for tile in TILES if tokens % tile == 0 and held(tile) <= VMEM), None)


def tpu_refuses(readers: int, tokens: int, dim: int, dtype: str, interpret: bool = False) -> str:
    """Why the TPU's kernels cannot; empty where they can. A reader has fewer sources of its own than there are readers that
    look at once. In interpret mode tokens and dim may be any."""
    if dtype not in ITEM:
        return f"sources are {dtype}: the Pallas look takes bfloat16 or float32"
    if interpret:
        return ""
    if dim % LANES or tokens % LANES:
        return f"T={tokens}, dim={dim}: the Pallas look needs multiples of {LANES}; use the XLA path"
    item = ITEM[dtype]
    needed = max(look_bytes(readers, LANES, dim, item), join_bytes(readers - 1, LANES, dim, item))
    if needed > VMEM:
        return (
            f"{readers} readers of dim={dim} need about {needed / 2**20:.1f} MiB on the chip, which grants "
            f"{VMEM / 2**20:.0f}; use more blocks, or the XLA path"
        )
    return ""
