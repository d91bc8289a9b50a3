"""The backward pass of a reader that joins its part with a few sources of its own: each array is brought once."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cache.tiles import column, row
from pallas_kernels.depth.kernel import Call, Part, length


class Given(NamedTuple):
    """What the kernel reads. All [B, T, D] but the direction, [1, D], and rows, [B, 1, T]."""

    direction: Part
    change: Part  # of the loss, by what was read
    found: Part  # what was read
    own: tuple[Part, ...]
    share: Part  # row: of the part's total in what was read
    whole: Part  # row: the logarithm of the sum of all powers


class Results(NamedTuple):
    """What it writes: the change by each."""

    direction: Part  # [B, 1, D]
    mass: Part  # row
    total: Part
    own: tuple[Part, ...]


class Kept(NamedTuple):
    """Room for a number per token, and for the sums over tokens."""

    share: Part
    whole: Part
    mass: Part
    turns: Part


def _body(given: Given, results: Results, kept: Kept, *, call: Call) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        kept.turns[...] = jnp.zeros(kept.turns.shape, jnp.float32)

    kept.share[...], kept.whole[...] = column(given.share[...]), column(given.whole[...])
    direction = given.direction[...]

    def add(tokens: Any) -> None:
        change, share = given.change[tokens, :].astype(jnp.float32), kept.share[tokens, :]
        along = jnp.sum(change * given.found[tokens, :].astype(jnp.float32), axis=1, keepdims=True)
        results.total[tokens, :] = (share * change).astype(call.dtype)
        kept.mass[tokens, :] = -share * along
        for source, result in zip(given.own, results.own, strict=True):
            x = source[tokens, :].astype(jnp.float32)
            inverse = length(x, call.epsilon)
            logit = jnp.sum(x * direction, axis=1, keepdims=True) * inverse
            power = jnp.exp(logit - kept.whole[tokens, :])
            slope = power * (jnp.sum(x * change, axis=1, keepdims=True) - along)
            by_product = slope * inverse
            by_square = by_product * logit * inverse / call.dim
            result[tokens, :] = (power * change + by_product * direction - by_square * x).astype(call.dtype)
            kept.turns[...] += jnp.sum((by_product * x).reshape(-1, call.sublanes, call.dim), axis=0)

    call.pieces(add)
    results.mass[...] = row(kept.mass[...])

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        results.direction[...] = jnp.sum(kept.turns[...], axis=0, keepdims=True)


def run(call: Call, given: Given) -> Results:
    """`call.sources` are those of the reader's own."""
    tokens = pl.BlockSpec((None, call.tile, call.dim), lambda b, t: (b, t, 0))
    numbers = pl.BlockSpec((None, 1, call.tile), lambda b, t: (b, 0, t))
    of_direction = pl.BlockSpec((1, call.dim), lambda b, t: (0, 0))
    of_turned = pl.BlockSpec((None, 1, call.dim), lambda b, t: (b, 0, 0))
    own, wide = (tokens,) * call.sources, jax.ShapeDtypeStruct(given.change.shape, call.dtype)
    shapes = Results(
        jax.ShapeDtypeStruct((call.batch, 1, call.dim), jnp.float32),
        jax.ShapeDtypeStruct(given.share.shape, jnp.float32),
        wide,
        (wide,) * call.sources,
    )
    room = pltpu.VMEM((call.tile, 1), jnp.float32)
    moved = (3 + 2 * call.sources) * wide.size * wide.dtype.itemsize
    numbers_moved = call.batch * call.tokens * call.sources
    return pl.pallas_call(
        functools.partial(_body, call=call),
        grid=call.grid[:2],
        in_specs=(Given(of_direction, tokens, tokens, own, numbers, numbers),),
        out_specs=(Results(of_turned, numbers, tokens, own),),
        out_shape=(shapes,),
        scratch_shapes=[Kept(room, room, room, pltpu.VMEM((call.sublanes, call.dim), jnp.float32))],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=numbers_moved, bytes_accessed=moved),
        interpret=call.interpret,
        name="depth_join_backward",
    )(given)[0]
