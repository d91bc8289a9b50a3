"""Cumulative-energy filtering: which entries of a read hold a share of its softmax weights.

An entry is kept where the weights larger than its own add up to less than the share of all: the fewest that reach it,
and the equals of the smallest. Sorting does not lower to Mosaic. Those sums are made by masks over all weights, in one
order of adding, where rounded sums too never fall as the mask grows: so what is kept is all from some weight on, exactly.
"""

from __future__ import annotations

import functools
import operator

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.cache.tiles import column

ONE = 0x3F800000  # the bits of 1, the largest weight. Floats from 0 on are ordered as their bits
HALVINGS = 30  # of as many numbers as there are from 0 to 1


def _total(parts: list[Array], axis: int) -> Array:
    return functools.reduce(operator.add, (jnp.sum(part, axis=axis, keepdims=True) for part in parts))


def least_weight(parts: list[Array], energy: float) -> Array:
    """[S, 1]: below which the weights, parts [S, X] in [0, 1], of each of S queries are dropped. It is the least number
    above which there is less than the share, found by halving. To compare all pairs would cost many times the read."""
    enough = energy * _total(parts, 1)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) >> 1
        bar = lax.bitcast_convert_type(middle, jnp.float32)
        little = _total([jnp.where(part > bar, part, 0.0) for part in parts], 1) < enough
        return jnp.where(little, low, middle + 1), jnp.where(little, middle, high)

    bounds = jnp.zeros(enough.shape, jnp.int32), jnp.full(enough.shape, ONE, jnp.int32)
    return lax.bitcast_convert_type(lax.fori_loop(0, HALVINGS, halve, bounds)[1], jnp.float32)


def without_dropped(parts: list[Array], energy: float) -> list[Array]:
    """The weights of many queries, 0 where they are dropped."""
    least = least_weight(parts, energy)
    return [jnp.where(part >= least, part, 0.0) for part in parts]


def without_dropped_of_one(parts: list[Array], energy: float) -> list[Array]:
    """The weights of one query, parts [1, X]. All pairs are compared at once, where halving would wait for thirty sums, one
    after the other."""
    enough = energy * _total(parts, 1)
    columns = [column(part) for part in parts]

    def kept(part: Array) -> Array:
        return _total([jnp.where(other > part, other, 0.0) for other in columns], 0) < enough

    return [jnp.where(kept(part), part, 0.0) for part in parts]
