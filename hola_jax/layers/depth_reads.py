"""What readers over depth find: a softmax over sources, in parts that can be joined, by plain XLA or by kernels.

The backward pass keeps little. Of a look it keeps the largest logits, for the sources come along on a `Trail`; of a join
what was read, and no sum of its parts: the slope of a logit is its weight times (g' source - g' read).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Float, Int
from hola_jax.layers.vectors import made_first, made_first_on_cpu
from hola_jax.memory.kernels import OverDepth

ABSENT = -1e30  # a logit whose power is zero, without inf - inf where nothing is there


class Part(NamedTuple):
    """Of a reader's softmax over sources, what some of them bring to it; more can join them."""

    top: Float[Array, "B T"]  # the largest logit, a constant to the backward pass: no read depends on it
    mass: Float[Array, "B T"]  # sum of exp(logit - top)
    total: Float[Array, "B T D"]  # sum of exp(logit - top) source, made in float32 and kept in the type of the sources


Parts = tuple[Part, ...]  # of each of R readers


def _logits(directions: Array, x: Array, epsilon: float) -> tuple[Array, Array]:
    """([R S B T], one over the root mean square of each source and token)."""
    inverse = lax.rsqrt(jnp.mean(x * x, axis=-1) + epsilon)
    return jnp.einsum("rd,sbtd->rsbt", directions, x, precision=lax.Precision.HIGHEST) * inverse, inverse


def look(
    directions: Float[Array, "R D"],
    sources: Float[Array, "S B T D"],
    epsilon: float,
    count: Int[Array, ""] | None = None,
) -> Parts:
    """What R readers find in sources, or in the first `count` of them. A direction is the query times the norm's scale."""
    x = sources.astype(jnp.float32)
    logits, _ = _logits(directions, x, epsilon)
    if count is not None:
        logits = jnp.where((jnp.arange(len(x)) < count)[:, None, None], logits, ABSENT)
    tops = lax.stop_gradient(jnp.max(logits, axis=1))
    powers = jnp.exp(logits - tops[:, None])
    totals = [jnp.sum(power[..., None] * x, axis=0).astype(sources.dtype) for power in powers]
    return tuple(map(Part, tops, jnp.sum(powers, axis=1), totals))


def _look_back(directions: Array, sources: Array, tops: Array, given: Parts, epsilon: float) -> tuple[Array, Array]:
    """(by the directions, by the sources in float32), in one pass over the sources for all readers."""
    x = made_first_on_cpu(sources).astype(jnp.float32)
    logits, inverse = _logits(directions, x, epsilon)
    logits, inverse, powers = made_first((logits, inverse, jnp.exp(logits - tops[:, None])))
    along = jnp.stack([jnp.sum(each.total * x, axis=-1) for each in given])  # [R S B T]
    slope = powers * (jnp.stack([each.mass for each in given])[:, None] + along)  # by logit
    by_product = slope * inverse
    by_square = jnp.sum(slope * logits, axis=0) * inverse**2 / x.shape[-1]
    back = -by_square[..., None] * x
    for power, each, product, direction in zip(powers, given, by_product, directions, strict=True):
        back += power[..., None] * each.total + product[..., None] * direction
    turned = jnp.einsum("rsbt,sbtd->rd", by_product, x, precision=lax.Precision.HIGHEST)
    return turned, back


class Trail(NamedTuple):
    """Sources that are only ever added to: what the backward pass needs of them at any step is in the last of them. So no
    step keeps them, and on the way back they come along, in the place of the gradient of `last`."""

    sources: Float[Array, "S B T D"]
    last: Float[Array, "S B T D"]  # of no value on the way forward


@jax.custom_vjp
def begun(sources: Float[Array, "S B T D"]) -> Trail:
    """A trail with the sources that are there."""
    return Trail(sources, jnp.zeros_like(sources))


begun.defvjp(lambda sources: (begun(sources), None), lambda _, given: (given.sources,))


@jax.custom_vjp
def ended(trail: Trail, parts: Parts) -> Parts:
    """What was found in a trail to which nothing is added any more."""
    return parts


def _from_the_end(sources: Array, given: Parts) -> tuple[Trail, Parts]:
    return Trail(jnp.zeros_like(sources), sources), given


ended.defvjp(lambda trail, parts: (parts, trail.sources), _from_the_end)


@dataclass(frozen=True)
class Looks:
    """How readers look at what is there of a trail: `counts` are the numbers of sources that there may be."""

    counts: tuple[int, ...]
    epsilon: float
    kernels: OverDepth | None

    def forward(self, directions: Array, sources: Array, number: Array) -> Parts:
        if self.kernels is not None:
            return tuple(map(Part, *self.kernels.look(directions, sources, self._count(number), **self._options)))

        def at(count: int, sources: Array) -> Parts:
            return look(directions, sources[:count], self.epsilon)

        return lax.switch(number, [partial(at, count) for count in self.counts], sources)

    def backward(
        self, directions: Array, sources: Array, number: Array, tops: Array, given: Parts, change: Array
    ) -> tuple[Array, Array]:
        """(by the directions, `change` by the sources with what comes by this look)."""
        if self.kernels is not None:
            parts = jnp.stack([part.mass for part in given]), tuple(part.total for part in given)
            count = self._count(number)
            return self.kernels.look_back(directions, sources, count, tops, *parts, change, **self._options)

        def at(count: int, sources: Array, change: Array) -> tuple[Array, Array]:
            turned, back = _look_back(directions, sources[:count], tops, given, self.epsilon)
            back += change[:count]
            return turned, lax.dynamic_update_slice_in_dim(change, back.astype(change.dtype), 0, 0)

        return lax.switch(number, [partial(at, count) for count in self.counts], sources, change)

    def _count(self, number: Array) -> Array:
        return jnp.asarray(self.counts, jnp.int32)[number]

    @property
    def _options(self) -> dict[str, Any]:
        assert self.kernels is not None
        return {"epsilon": self.epsilon, "interpret": self.kernels.interpret}


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def look_along(
    directions: Float[Array, "R D"], trail: Trail, number: Int[Array, ""], looks: Looks
) -> tuple[Parts, Trail]:
    """What readers find in the first `looks.counts[number]` sources, and the trail to go on with: sources after these may be
    added to it, these stay."""
    return looks.forward(directions, trail.sources, number), trail


def _along_forward(directions: Array, trail: Trail, number: Array, looks: Looks) -> tuple[tuple[Parts, Trail], Any]:
    parts = looks.forward(directions, trail.sources, number)
    return (parts, trail), (directions, number, jnp.stack([part.top for part in parts]))


def _along_backward(looks: Looks, kept: Any, given: tuple[Parts, Trail]) -> tuple[Array, Trail, None]:
    (directions, number, tops), (parts, (change, sources)) = made_first(kept), given
    turned, change = looks.backward(directions, sources, number, tops, parts, change)
    return turned, Trail(change, sources), None


look_along.defvjp(_along_forward, _along_backward)


def _logit(direction: Array, source: Array, epsilon: float) -> tuple[Array, Array]:
    """(the logit, one over the root mean square) of each token."""
    x = source.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(x * x, axis=-1) + epsilon)
    return jnp.sum(x * direction, axis=-1) * inverse, inverse


Joined = tuple[Array, tuple[Array, ...], Array, Array, Array]


def _join(
    direction: Array, part: Part, own: tuple[Array, ...], epsilon: float, kernels: OverDepth | None
) -> tuple[Array, Joined]:
    logits = [_logit(direction, source, epsilon)[0] for source in own]
    top = reduce(jnp.maximum, logits, part.top)
    share = jnp.exp(part.top - top)
    powers = [jnp.exp(logit - top) for logit in logits]
    mass = sum(powers, share * part.mass)
    share /= mass
    found = share[..., None] * part.total
    for power, source in zip(powers, own, strict=True):
        found += (power / mass)[..., None] * source
    found = found.astype(part.total.dtype)
    return found, (direction, own, found, share, top + jnp.log(mass))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def join(
    direction: Float[Array, " D"],
    part: Part,
    own: tuple[Float[Array, "B T D"], ...],
    epsilon: float,
    kernels: OverDepth | None,
) -> Float[Array, "B T D"]:
    """What a reader reads to whose part some sources more come. The backward pass keeps no total: what was read will do."""
    return _join(direction, part, own, epsilon, kernels)[0]


def _join_back(
    epsilon: float, kernels: OverDepth | None, joined: Joined, given: Array
) -> tuple[Array, Part, tuple[Array, ...]]:
    direction, own, found, share, whole = joined
    if kernels is not None and own:
        turned, *change, by_own = kernels.join_back(*joined, given, epsilon=epsilon, interpret=kernels.interpret)
        return turned, Part(jnp.zeros_like(share), *change), by_own
    direction, share, whole = made_first((direction, share, whole))
    g = given.astype(jnp.float32)
    along = jnp.sum(g * found, axis=-1)
    turned, changes = jnp.zeros_like(direction), []
    for source in own:
        logit, inverse = _logit(direction, source, epsilon)
        power = jnp.exp(logit - whole)
        slope = power * (jnp.sum(g * source, axis=-1) - along)
        by_product, by_square = slope * inverse, slope * logit * inverse**2 / source.shape[-1]
        back = power[..., None] * g + by_product[..., None] * direction - by_square[..., None] * source
        turned += jnp.einsum("bt,btd->d", by_product, source.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        changes.append(back.astype(source.dtype))
    part = Part(jnp.zeros_like(share), -share * along, (share[..., None] * g).astype(given.dtype))
    return turned, part, tuple(changes)


join.defvjp(_join, _join_back)
