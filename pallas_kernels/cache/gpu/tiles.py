"""Small pieces of the GPU kernels: shared memory as the tensor cores want it, products, and loops.

What is here runs on the chip and under the interpreter alike. That is why both operands of a product come from shared
memory: the interpreter knows none in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # that a warpgroup multiplies at a time, and entries that arrive at a time
SQUARE = ROWS, ROWS
LOG2E = 1.4426950408889634  # the chip knows powers of two
BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
MULTIPLYING, COPYING = 232, 40  # registers of a thread, where two warpgroups multiply and one copies


def matrix(*shape: int) -> Any:
    """Scratch for bfloat16 matrices that tensor cores and the copy engine read without bank conflicts."""
    transforms: Any = plgpu  # mypy takes its transforms for abstract
    tiled, swizzled = transforms.TilingTransform((8, 64)), transforms.SwizzleTransform(128)
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(tiled, swizzled))


def flipped(ref: Any) -> Any:
    """The transpose of a matrix in shared memory, which is not moved."""
    return ref.at[...].transpose((1, 0))


def product(a: Any, b: Any) -> Array:
    """a b of two matrices in shared memory, float32 in registers."""

    def multiply(sums: Any) -> Array:
        plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def add_product(sums: Array, a: Any, b: Any, interpret: bool) -> Array:
    """sums + a b. On the chip the tensor cores add, in the registers of `sums`, which the interpreter cannot follow."""
    if interpret:
        return sums + product(a, b)

    def multiply(held: Any) -> None:
        plgpu.wgmma(held, a, b)

    return pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(sums))


def zeros(*shape: int) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def by_row(column: Array) -> Array:
    """A number for each row of a square, repeated along it."""
    return lax.broadcast_in_dim(column, SQUARE, [0])


def by_column(row: Array) -> Array:
    return lax.broadcast_in_dim(row, SQUARE, [1])


def index(axis: int) -> Array:
    """Of a square."""
    return plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=plgpu.Layout.WGMMA)


def loop(start: Any, stop: Any, body: Callable[[Any], None]) -> None:
    """`body` for each number of a range, for what it does to references."""

    def step(i: Any, _: None) -> None:
        body(i)

    lax.fori_loop(start, stop, step, None)


def turn(step: Any, stages: int) -> Any:
    """Which of a ring's buffers a step has; see `unmoved`."""
    return lax.rem(step, jnp.int32(stages)) if stages > 1 else unmoved(0, step)


def unmoved(place: Any, step: Any) -> Any:
    """`place`, as something that seems to change from step to step. The compiler computes what a loop does not change
    before it; for the addresses of 16 slices of each operand it then runs out of registers, and spills the sums."""
    return place + lax.shift_right_logical(step, jnp.int32(20))


def bfloat16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
