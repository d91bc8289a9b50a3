"""Both kernels: a tile of tokens and one source per grid step, for all readers.

The sources of a tile come one after the other, so the forward pass keeps for each reader a softmax that grows, as in
attention by blocks. The backward pass knows the largest logit and needs each source once. A tile is worked through a few
tokens at a time: what is made of them stays in registers.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cache.tiles import column, row

PIECE = 32  # tokens worked on at once
SUBLANES = 8
Part = Any


class Call(NamedTuple):
    """The sizes and choices of one call, all static."""

    sources: int
    batch: int
    tokens: int
    tile: int
    readers: int
    dim: int
    epsilon: float
    dtype: Any
    interpret: Any

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.tokens // self.tile, self.sources

    @property
    def piece(self) -> int:
        return PIECE if self.tile % PIECE == 0 else self.tile

    @property
    def sublanes(self) -> int:
        return math.gcd(SUBLANES, self.piece)

    def pieces(self, work: Any) -> None:
        """`work` on the tokens of each piece of a tile."""
        lax.fori_loop(0, self.tile // self.piece, lambda i, _: work(pl.ds(i * self.piece, self.piece)), None)


def length(x: jax.Array, epsilon: float) -> jax.Array:
    """[P, 1]: one over the root mean square."""
    return lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + epsilon)


class Columns(NamedTuple):
    """Room for two numbers per reader and token."""

    first: Part
    second: Part


def _forward(
    count: Part,
    directions: Part,
    source: Part,
    top: Part,
    mass: Part,
    totals: tuple[Part, ...],
    kept: Columns,
    sums: Part,
    *,
    call: Call,
) -> None:
    at, (tops, masses) = pl.program_id(2), kept

    @pl.when(at == 0)
    def _() -> None:
        tops[...] = jnp.full(tops.shape, -jnp.inf, jnp.float32)
        masses[...] = jnp.zeros(masses.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    def add(tokens: Any) -> None:
        x = source[tokens, :].astype(jnp.float32)
        inverse = length(x, call.epsilon)
        for reader in range(call.readers):
            logit = jnp.sum(x * directions[reader : reader + 1, :], axis=1, keepdims=True) * inverse
            before = tops[reader, tokens, :]
            largest = jnp.maximum(before, logit)
            stays, power = jnp.exp(before - largest), jnp.exp(logit - largest)
            tops[reader, tokens, :] = largest
            masses[reader, tokens, :] = stays * masses[reader, tokens, :] + power
            sums[reader, tokens, :] = stays * sums[reader, tokens, :] + power * x

    @pl.when(at < count[0])
    def _() -> None:
        call.pieces(add)

    @pl.when(at == call.sources - 1)
    def _() -> None:
        for reader in range(call.readers):
            top[reader : reader + 1, :] = row(tops[reader])
            mass[reader : reader + 1, :] = row(masses[reader])
            totals[reader][...] = sums[reader].astype(call.dtype)


def _backward(
    count: Part,
    directions: Part,
    source: Part,
    top: Part,
    by_mass: Part,
    by_totals: tuple[Part, ...],
    change: Part,
    turned: Part,
    changed: Part,
    kept: Columns,
    turns: Part,
    *,
    call: Call,
) -> None:
    at, (tops, by_masses) = pl.program_id(2), kept

    @pl.when((at == 0) & (pl.program_id(1) == 0))
    def _() -> None:
        turns[...] = jnp.zeros(turns.shape, jnp.float32)

    @pl.when(at == 0)
    def _() -> None:
        for reader in range(call.readers):
            tops[reader] = column(top[reader : reader + 1, :])
            by_masses[reader] = column(by_mass[reader : reader + 1, :])

    def add(tokens: Any) -> None:
        x = source[tokens, :].astype(jnp.float32)
        inverse = length(x, call.epsilon)
        back, by_square = change[tokens, :].astype(jnp.float32), jnp.zeros_like(inverse)
        for reader in range(call.readers):
            direction, given = directions[reader : reader + 1, :], by_totals[reader][tokens, :].astype(jnp.float32)
            logit = jnp.sum(x * direction, axis=1, keepdims=True) * inverse
            power = jnp.exp(logit - tops[reader, tokens, :])
            slope = power * (by_masses[reader, tokens, :] + jnp.sum(x * given, axis=1, keepdims=True))
            by_square += slope * logit
            by_product = slope * inverse
            back += power * given + by_product * direction
            turns[reader] += jnp.sum((by_product * x).reshape(-1, call.sublanes, call.dim), axis=0)
        changed[tokens, :] = (back - (by_square * inverse * inverse / call.dim) * x).astype(call.dtype)

    @pl.when(at < count[0])
    def _() -> None:
        call.pieces(add)

    @pl.when((at == call.sources - 1) & (pl.program_id(1) == pl.num_programs(1) - 1))
    def _() -> None:
        turned[...] = jnp.sum(turns[...], axis=1)


def _of_source(call: Call) -> pl.BlockSpec:
    """A source that is not there is not fetched: the one before it stays."""
    return pl.BlockSpec((None, None, call.tile, call.dim), lambda b, t, s, count: (lax.min(s, count[0] - 1), b, t, 0))


def _of_readers(call: Call) -> tuple[pl.BlockSpec, ...]:
    return (pl.BlockSpec((None, call.tile, call.dim), lambda b, t, s, count: (b, t, 0)),) * call.readers


def _rows(call: Call) -> pl.BlockSpec:
    return pl.BlockSpec((None, call.readers, call.tile), lambda b, t, s, count: (b, 0, t))


def _directions(call: Call) -> pl.BlockSpec:
    return pl.BlockSpec((call.readers, call.dim), lambda b, t, s, count: (0, 0))


def _cost(call: Call, passes: int) -> pl.CostEstimate:
    """No products, and bytes as if half of the sources were there, which is the mean over the groups of a model. `passes`
    over sources, one over what the readers have of their own."""
    size = call.batch * call.tokens * call.dim
    moved = (passes * call.sources / 2 + call.readers) * size * jnp.dtype(call.dtype).itemsize
    exponentials = call.batch * call.tokens * call.readers * call.sources
    return pl.CostEstimate(flops=0, transcendentals=exponentials, bytes_accessed=int(moved))


def _run(call: Call, body: Any, name: str, passes: int, specs: tuple[Any, ...], aliases: Any, tiles: Any) -> Any:
    in_specs, out_specs, out_shape, scratch = specs
    return pl.pallas_call(
        functools.partial(body, call=call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=call.grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", tiles, "arbitrary")),
        cost_estimate=_cost(call, passes),
        interpret=call.interpret,
        name=name,
    )


def _columns(call: Call) -> Columns:
    room = pltpu.VMEM((call.readers, call.tile, 1), jnp.float32)
    return Columns(room, room)


def forward(call: Call, count: jax.Array, directions: jax.Array, sources: jax.Array) -> Any:
    """tops, masses [B, R, T] and totals, R of [B, T, D]."""
    rows = jax.ShapeDtypeStruct((call.batch, call.readers, call.tokens), jnp.float32)
    total = jax.ShapeDtypeStruct(sources.shape[1:], sources.dtype)
    specs = (
        (_directions(call), _of_source(call)),
        (_rows(call), _rows(call), _of_readers(call)),
        (rows, rows, (total,) * call.readers),
        (_columns(call), pltpu.VMEM((call.readers, call.tile, call.dim), jnp.float32)),
    )
    run = _run(call, _forward, "depth_forward", 1, specs, {}, "parallel")
    return run(count, directions, sources)


def backward(
    call: Call,
    count: jax.Array,
    directions: jax.Array,
    sources: jax.Array,
    tops: jax.Array,
    by_masses: jax.Array,
    by_totals: tuple[jax.Array, ...],
    change: jax.Array,
) -> Any:
    """The change by the directions [B, R, D] and, in the place of `change`, by the sources."""
    turned = jax.ShapeDtypeStruct((call.batch, call.readers, call.dim), jnp.float32)
    of_turned = pl.BlockSpec((None, call.readers, call.dim), lambda b, t, s, count: (b, 0, 0))
    specs = (
        (_directions(call), _of_source(call), _rows(call), _rows(call), _of_readers(call), _of_source(call)),
        (of_turned, _of_source(call)),
        (turned, jax.ShapeDtypeStruct(change.shape, change.dtype)),
        (_columns(call), pltpu.VMEM((call.readers, call.sublanes, call.dim), jnp.float32)),
    )
    place = 5 + call.readers  # of `change` among all that are given
    run = _run(call, _backward, "depth_backward", 3, specs, {place: 1}, "arbitrary")
    return run(count, directions, sources, tops, by_masses, by_totals, change)
