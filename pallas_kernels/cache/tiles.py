"""Small pieces of a kernel's body: products, turning rows into columns, and the queries of a block in tiles."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))  # which axes of two matrices are summed over


def dot(a: Array, b: Array, axes: tuple[tuple[int], tuple[int]] = NN) -> Array:
    """A product accumulated in float32. What is float32 stays so: a matrix unit would round it to bfloat16 unasked."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def pick(one_hot: Array, rows: Array) -> Array:
    """The rows that a one-hot matrix names, float32. Each is one product with 1, so bfloat16 rows come out as they are."""
    return dot(one_hot.astype(rows.dtype), rows)


def hand_back(one_hot: Array, rows: Array, dtype: jnp.dtype) -> Array:
    """`pick` of float32 rows that end as `dtype`. For bfloat16 they go as two bfloat16 terms, 16 bits: a third of the
    passes through the matrix unit that float32 takes."""
    if dtype == jnp.float32:
        return pick(one_hot, rows)
    high = rows.astype(jnp.bfloat16)
    low = (rows - high.astype(jnp.float32)).astype(jnp.bfloat16)
    return pick(one_hot, high) + pick(one_hot, low)


def index(shape: tuple[int, int], axis: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _diagonal(size: int) -> Array:
    return index((size, size), 0) == index((size, size), 1)


def _least(dtype: jnp.dtype) -> float | int:
    return -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def column(row: Array) -> Array:
    """[1, X] -> [X, 1]: a masked maximum, where Mosaic may know no transposition of one row."""
    return jnp.max(jnp.where(_diagonal(row.shape[1]), row, _least(row.dtype)), axis=1, keepdims=True)


def row(column: Array) -> Array:
    """[X, 1] -> [1, X]."""
    return jnp.max(jnp.where(_diagonal(column.shape[0]), column, _least(column.dtype)), axis=0, keepdims=True)


def query_tiles(block: int) -> list[slice]:
    """The queries of a block, 128 at a time where that divides it: a tile meets only the keys its last query sees."""
    size = 128 if block % 128 == 0 else block
    return [slice(start, start + size) for start in range(0, block, size)]


def count(true: Array, axis: int) -> Array:
    return jnp.sum(jnp.where(true, 1.0, 0.0), axis=axis, keepdims=True)
