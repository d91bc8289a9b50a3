"""Matrix products on a warpgroup's tensor cores: bfloat16 in, float32 out, tiles of 64 by 64.

A left operand comes from shared memory or from registers, a right one from shared memory. A float32 operand is two
bfloat16 ones, `split`: their sum has 16 of its 24 digits, and a product with an operand that is bfloat16 anyway loses
no more than 2^-17 of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64
LAYOUT = plgpu.Layout.WGMMA  # how a warpgroup holds a tile
Tile = Any  # a [64, 64] array in registers or a reference to shared memory


def launch(name: str, body: Callable[..., None], grid: dict[str, int], **given: Any) -> Callable[..., Any]:
    """A kernel under a name. Layouts of registers are said where they matter, not searched for: that takes minutes."""

    def kernel(*refs: Any) -> None:
        body(*refs)

    kernel.__name__ = name
    semantics = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    return plgpu.kernel(kernel, grid=tuple(grid.values()), grid_names=tuple(grid), compiler_params=semantics, **given)


def _room(count: tuple[int, ...], dtype: Any) -> Any:
    """Swizzled by 128 bytes, as copies and tensor cores like it."""
    api: Any = plgpu
    width = 128 // jnp.dtype(dtype).itemsize
    swizzled = (api.TilingTransform((8, width)), api.SwizzleTransform(128))
    return plgpu.SMEM((*count, TILE, TILE), dtype, transforms=swizzled)


def tiles(*count: int) -> Any:
    """Room for bfloat16 tiles."""
    return _room(count, jnp.bfloat16)


def sums(*count: int) -> Any:
    """Room for float32 tiles."""
    return _room(count, jnp.float32)


def transposed(tile: Any) -> Any:
    return tile.transpose((1, 0))


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 as the sum of two bfloat16."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def product(*pairs: tuple[Tile, Tile], room: Any) -> jax.Array:
    """The sum of the products of pairs. A left operand in registers keeps them until its product is done, so one such
    product is waited for before the next but one is begun. Simulated tensor cores take references alone: there, `room`
    is a tile of memory to lay a left operand down."""

    def multiply(accumulator: Any) -> jax.Array:
        for left, right in pairs:
            if not isinstance(left, jax.Array):
                plgpu.wgmma(accumulator, left, right)
            elif room is None:
                plgpu.wgmma(accumulator, left, right)
                plgpu.wgmma_wait(1)
            else:
                room[...] = left
                plgpu.wgmma(accumulator, room, right)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((TILE, TILE), jnp.float32))


def three_pass(left: jax.Array, high: Tile, low: Tile) -> list[tuple[Tile, Tile]]:
    """The pairs of a float32 product: what is left out is 2^-18 of it."""
    a, b = split(left)
    return [(a, high), (b, high), (a, low)]


def by_row(vector: jax.Array) -> jax.Array:
    return jax.lax.broadcast_in_dim(vector, (TILE, TILE), [0])


def by_column(vector: jax.Array) -> jax.Array:
    return jax.lax.broadcast_in_dim(vector, (TILE, TILE), [1])


def along_rows(ref: Any) -> jax.Array:
    """64 numbers, one for each row of a tile."""
    return plgpu.load(ref, layout=LAYOUT.reduce(1))


def along_columns(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=LAYOUT.reduce(0))


def zeros() -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), LAYOUT)


def flipped(tile: jax.Array) -> jax.Array:
    """The tile as it must be held to be stored to, or as it was loaded from, a transposed reference."""
    return plgpu.layout_cast(tile, plgpu.Layout.WGMMA_TRANSPOSED)


def load_transposed(ref: Any) -> jax.Array:
    held = plgpu.load(transposed(ref), layout=plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(held, LAYOUT)
