"""The public functions: what they accept, and how arrays lie for the kernels. Numbers go as [B, R, T], in whole lanes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.depth import join, kernel
from pallas_kernels.depth.join import Given
from pallas_kernels.depth.kernel import Call
from pallas_kernels.depth.limits import join_bytes, look_bytes, tile_of, tpu_refuses


class Found(NamedTuple):
    """Of a softmax over sources, what some of them bring to R readers."""

    tops: jax.Array  # [R, B, T] float32: the largest logit
    masses: jax.Array  # [R, B, T] float32: sum of exp(logit - top)
    totals: tuple[jax.Array, ...]  # R of [B, T, D]: sum of exp(logit - top) source, in the type of the sources


def look(
    directions: jax.Array, sources: jax.Array, count: jax.Array, *, epsilon: float, interpret: Any = False
) -> Found:
    """What readers with these directions [R, D] find in the first `count` (at least one) of sources [S, B, T, D].

    A logit is the direction's product with the source over its root mean square. All sums are float32. Each source is
    fetched once, and those after the first `count` are not."""
    call = _look(directions, sources, epsilon, interpret)
    tops, masses, totals = kernel.forward(call, _number(count), directions.astype(jnp.float32), sources)
    return Found(tops.swapaxes(0, 1), masses.swapaxes(0, 1), totals)


def look_back(
    directions: jax.Array,
    sources: jax.Array,
    count: jax.Array,
    tops: jax.Array,
    by_masses: jax.Array,
    by_totals: tuple[jax.Array, ...],
    change: jax.Array,
    *,
    epsilon: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(the change of a loss by the directions, `change` [S, B, T, D], its change by the sources, with what comes by this
    look added, in place where the caller gives it away). `tops` is what `look` found, a constant; `by_masses` and
    `by_totals` are the change by the rest of it."""
    call = _look(directions, sources, epsilon, interpret)
    top, by_mass = (x.astype(jnp.float32).swapaxes(0, 1) for x in (tops, by_masses))
    directions = directions.astype(jnp.float32)
    turned, change = kernel.backward(call, _number(count), directions, sources, top, by_mass, by_totals, change)
    return jnp.sum(turned, axis=0), change


def join_back(
    direction: jax.Array,
    own: tuple[jax.Array, ...],
    found: jax.Array,
    share: jax.Array,
    whole: jax.Array,
    change: jax.Array,
    *,
    epsilon: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """The change of a loss by the direction [D] of a reader, by mass [B, T] and total [B, T, D] of the part that it had, and
    by the sources of its `own`, each [B, T, D], that it joined to it.

    `change` is that by what it read, `found` [B, T, D]; `share` [B, T] is what each unit of the total was in it, `whole`
    [B, T] the logarithm of the sum of exp(logit) over all sources."""
    batch, tokens, dim = found.shape
    if why_not := tpu_refuses(1 + len(own), tokens, dim, found.dtype.name, bool(interpret)):
        raise NotImplementedError(why_not)
    tile = tile_of(tokens, lambda tile: join_bytes(len(own), tile, dim, found.dtype.itemsize)) or tokens
    call = Call(len(own), batch, tokens, tile, 1, dim, epsilon, found.dtype, interpret)
    row = direction.astype(jnp.float32)[None]
    given = Given(row, change, found, own, *(x.astype(jnp.float32)[:, None] for x in (share, whole)))
    turned, by_mass, by_total, by_own = join.run(call, given)
    return jnp.sum(turned, axis=(0, 1)), by_mass[:, 0], by_total, by_own


def _number(count: jax.Array) -> jax.Array:
    return jnp.asarray(count, jnp.int32).reshape(1)


def _look(directions: jax.Array, sources: jax.Array, epsilon: float, interpret: Any) -> Call:
    (readers, dim), (number, batch, tokens, wide) = directions.shape, sources.shape
    if wide != dim:
        raise ValueError(f"directions are {directions.shape} and sources {sources.shape}; both must end with one D")
    if why_not := tpu_refuses(readers, tokens, dim, sources.dtype.name, bool(interpret)):
        raise NotImplementedError(why_not)
    item = sources.dtype.itemsize
    tile = tile_of(tokens, lambda tile: look_bytes(readers, tile, dim, item)) or tokens
    return Call(number, batch, tokens, tile, readers, dim, epsilon, sources.dtype, interpret)
