"""Projections: parameters in float32, products in the type of the input."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hola_jax.array_types import Array, Float
from hola_jax.layers.init import named_key, normal


class Linear(nnx.Module):
    """x W, plus a bias where asked for."""

    def __init__(self, inputs: int, outputs: int, key: Array, *, bias: bool = False) -> None:
        self.kernel = nnx.Param(normal(key, inputs, outputs))
        self.bias = nnx.Param(jnp.zeros(outputs), weight_decay=False) if bias else None

    def __call__(self, x: Float[Array, "... D"], dtype: DTypeLike | None = None) -> Float[Array, "... E"]:
        """In the type of `x`, or in `dtype`, which float32 accumulation then reaches unrounded."""
        dtype = x.dtype if dtype is None else dtype
        y = jnp.dot(x, self.kernel[...].astype(x.dtype), preferred_element_type=dtype)
        return y if self.bias is None else y + self.bias[...].astype(dtype)


class LowRank(nnx.Module):
    """x W1 W2, plus a bias where asked for."""

    def __init__(self, inputs: int, rank: int, outputs: int, key: Array, *, bias: bool = False) -> None:
        self.down = Linear(inputs, rank, named_key(key, "down"))
        self.up = Linear(rank, outputs, named_key(key, "up"), bias=bias)

    def __call__(self, x: Float[Array, "... D"], dtype: DTypeLike | None = None) -> Float[Array, "... E"]:
        return self.up(self.down(x), dtype)
