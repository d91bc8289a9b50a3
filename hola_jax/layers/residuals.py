"""How sub-layers are joined over depth: the plain sum, or Attention Residuals (arXiv 2603.15031), full and in blocks.

A sub-layer is a mixer or an MLP with its norms; it reads one vector per token and answers with one. In place of one running
sum there are sources: the first is the embedding, and each sub-layer's output is added to one of the others, to its own
(full) or to its block's (so a block's source is the plain sum inside of it). What a sub-layer reads is a softmax over the
sources that are there, with a learned query against their norms, per token and in float32.

Queries are parameters, so they are known before the layers run. Layers go in groups: all readers of a group look at once at
the sources from before it, and each adds what it finds among the group's own. That is the same softmax, in two parts that
are joined; and the backward pass then needs the sources once per group and not once per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from hola_jax.array_types import Array, Float, Int
from hola_jax.config import ModelConfig, nearest_divisor, residual_blocks
from hola_jax.layers.vectors import made_first, made_first_on_cpu

MIXER, MLP = 0, 1  # the sub-layers of a block
ABSENT = -1e30  # a logit whose power is zero, without inf - inf where nothing is there


class Residual(Protocol):
    """What a block asks of the rule that joins its sub-layers. `x` is whatever passes from layer to layer."""

    def read(self, x: Any, sublayer: int) -> Float[Array, "B T D"]: ...

    def add(self, x: Any, y: Float[Array, "B T D"], sublayer: int) -> Any: ...


@jax.tree_util.register_static
class Plain:
    """One running sum."""

    def read(self, x: Array, sublayer: int) -> Array:
        return x

    def add(self, x: Array, y: Array, sublayer: int) -> Array:
        return x + y


class Read(nnx.Module):
    """What a reader learns: a query, zero at the beginning, when it reads the mean, and the scale of the sources' norm."""

    def __init__(self, config: ModelConfig) -> None:
        self.query = nnx.Param(jnp.zeros(config.dim), weight_decay=False)
        self.scale = nnx.Param(jnp.ones(config.dim), weight_decay=False)


class Part(NamedTuple):
    """Of the softmax over sources of R readers, what some of the sources bring; any parts of it can be joined."""

    top: Float[Array, "R B T"]  # the largest logit, a constant to the backward pass: no read depends on it
    mass: Float[Array, "R B T"]  # sum of exp(logit - top)
    total: Float[Array, "R B T D"]  # sum of exp(logit - top) source


Looked = tuple[Array, ...]


def _look(directions: Array, sources: Array, count: Array | int, epsilon: float) -> tuple[Part, Looked]:
    x = sources.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(x * x, axis=-1) + epsilon)
    logits = jnp.einsum("rd,sbtd->rsbt", directions, x, precision=lax.Precision.HIGHEST) * inverse
    logits = jnp.where((jnp.arange(len(x)) < count)[:, None, None], logits, ABSENT)
    top = jnp.max(logits, axis=1)
    powers = jnp.exp(logits - top[:, None])
    total = jnp.stack([jnp.sum(power[..., None] * x, axis=0) for power in powers])
    return Part(top, jnp.sum(powers, axis=1), total), (directions, sources, inverse, logits, powers)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def look(
    directions: Float[Array, "R D"], sources: Float[Array, "S B T D"], count: Int[Array, ""] | int, epsilon: float
) -> Part:
    """What R readers find in the first `count` sources; a direction is the query times the norm's scale.

    The backward pass goes over the sources once, for all readers, and keeps them in their own type."""
    return _look(directions, sources, count, epsilon)[0]


def _look_back(epsilon: float, looked: Looked, given: Part) -> tuple[Array, Array, None]:
    directions, sources, inverse, logits, powers = looked
    directions, inverse, logits, powers = made_first((directions, inverse, logits, powers))
    x = made_first_on_cpu(sources).astype(jnp.float32)
    along = jnp.stack([jnp.sum(each * x, axis=-1) for each in given.total])  # [R S B T]
    slope = powers * (given.mass[:, None] + along)  # by logit
    by_product = slope * inverse
    by_square = jnp.sum(slope * logits, axis=0) * inverse**2 / x.shape[-1]
    back = -by_square[..., None] * x
    for power, each, product, direction in zip(powers, given.total, by_product, directions, strict=True):
        back += power[..., None] * each + product[..., None] * direction
    turned = jnp.einsum("rsbt,sbtd->rd", by_product, x, precision=lax.Precision.HIGHEST)
    return turned, made_first_on_cpu(back.astype(sources.dtype)), None


look.defvjp(_look, _look_back)


def _mean(parts: tuple[Part, ...], dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    tops = jnp.stack([part.top for part in parts])
    shares = jnp.exp(tops - jnp.max(tops, axis=0))
    shares /= sum(share * part.mass for share, part in zip(shares, parts, strict=True))
    found = sum((share[..., None] * part.total for share, part in zip(shares, parts, strict=True)), jnp.float32(0))
    found = found.astype(dtype)
    return found, (shares, found)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def mean(parts: tuple[Part, ...], dtype: Any) -> Float[Array, "R B T D"]:
    """What readers read whose softmax has these parts. Of the parts the backward pass keeps no total: the mean is enough."""
    return _mean(parts, dtype)[0]


def _mean_back(dtype: Any, kept: tuple[Array, Array], given: Array) -> tuple[tuple[Part, ...]]:
    shares, found = made_first(kept[0]), kept[1]
    given = given.astype(jnp.float32)
    along = jnp.sum(given * found, axis=-1)
    return (tuple(Part(jnp.zeros_like(share), -share * along, share[..., None] * given) for share in shares),)


mean.defvjp(_mean, _mean_back)


def _at(tree: Any, index: int | slice) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["directions", "earlier"],
    meta_fields=["sums", "dtype", "epsilon"],
)
@dataclass(frozen=True)
class InGroup:
    """The rule inside a layer of a group. `x` is the group's own sources: its block's sum, or every output."""

    directions: Float[Array, "2 D"]
    earlier: Part  # R = 2: what the layer's readers find in the sources from before the group
    sums: bool
    dtype: Any
    epsilon: float

    def read(self, x: tuple[Array, ...], sublayer: int) -> Float[Array, "B T D"]:
        reader = slice(sublayer, sublayer + 1)
        parts = [_at(self.earlier, reader)]
        parts += [look(self.directions[reader], source[None], 1, self.epsilon) for source in x]
        return mean(tuple(parts), self.dtype)[0]

    def add(self, x: tuple[Array, ...], y: Float[Array, "B T D"], sublayer: int) -> tuple[Array, ...]:
        return (x[0] + y,) if self.sums and x else (*x, y)


@partial(jax.tree_util.register_dataclass, data_fields=["directions", "counts", "slots"], meta_fields=["epsilon"])
@dataclass(frozen=True)
class OfOneToken:
    """The rule inside a layer when one token goes through all. `x` is all sources: few numbers, looked at each time."""

    directions: Float[Array, "2 D"]
    counts: Int[Array, " 2"]  # how many sources are there
    slots: Int[Array, " 2"]  # to which of them the outputs are added
    epsilon: float

    def read(self, x: Float[Array, "S B 1 D"], sublayer: int) -> Float[Array, "B 1 D"]:
        found = look(self.directions[sublayer][None], x, self.counts[sublayer], self.epsilon)
        return mean((found,), x.dtype)[0]

    def add(self, x: Float[Array, "S B 1 D"], y: Float[Array, "B 1 D"], sublayer: int) -> Float[Array, "S B 1 D"]:
        slot = self.slots[sublayer]
        return lax.dynamic_update_index_in_dim(x, lax.dynamic_index_in_dim(x, slot, keepdims=False) + y, slot, 0)


# (x, ((parameters, rule), state)) of a layer, or those of all layers stacked, to (x, the state afterwards).
Layer = Callable[[Any, tuple[tuple[Any, Residual], Any]], tuple[Any, Any]]


def attend_over_depth(
    config: ModelConfig,
    layer: Layer,
    through: Layer,
    x: Float[Array, "B T D"],
    layers: dict[str, Any],
    states: Any,
    last: Read,
) -> tuple[Float[Array, "B T D"], Any]:
    """(what the reader `last` finds in all sources, what the layers return besides).

    layer    runs one
    through  runs all of them in order
    layers   parameters of all layers, stacked; those of their readers must be whole
    """
    sublayers = 2 * config.layers
    full = config.residual == "attention"
    block = 1 if full else sublayers // residual_blocks(config)
    both = [layers[name]["query"] * layers[name]["scale"] for name in ("mixer_read", "mlp_read")]
    directions = jnp.stack(both, axis=1)  # [N 2 D]
    sources = jnp.zeros((1 + sublayers // block, *x.shape), x.dtype).at[0].set(x)
    if x.shape[1] == 1:
        numbers = jnp.arange(sublayers).reshape(-1, 2)
        slots = 1 + numbers // block
        rules = OfOneToken(directions, slots + (numbers % block > 0), slots, config.norm_epsilon)
        sources, after = through(sources, ((layers, rules), states))
    else:
        size = nearest_divisor(config.layers, math.sqrt(config.layers)) if full else block // 2
        sources, after = _in_groups(config, size, layer, sources, (layers, directions, states))
    found = look((last.query[...] * last.scale[...])[None], sources, len(sources), config.norm_epsilon)
    return mean((found,), x.dtype)[0], after


def _in_groups(
    config: ModelConfig, size: int, layer: Layer, sources: Float[Array, "S B T D"], stacked: tuple[Any, Array, Any]
) -> tuple[Float[Array, "S B T D"], Any]:
    """A scan over groups of `size` layers, which are written out: a scan of them would keep what it keeps twice."""
    groups = config.layers // size
    own_sources = (len(sources) - 1) // groups

    def group(sources: Array, given: tuple[Array, tuple[Any, Array, Any]]) -> tuple[Array, Any]:
        number, (layers, directions, states) = given
        number, directions = made_first((number, directions))
        count = 1 + number * own_sources
        earlier = look(directions.reshape(2 * size, -1), sources, count, config.norm_epsilon)
        own: tuple[Array, ...] = ()
        afters = []
        for i in range(size):
            params, way, state = _at((layers, directions, states), i)
            rule = InGroup(
                way, _at(earlier, slice(2 * i, 2 * i + 2)), own_sources == 1, sources.dtype, config.norm_epsilon
            )
            own, after = layer(own, ((params, rule), state))
            afters.append(after)
        sources = lax.dynamic_update_slice_in_dim(sources, jnp.stack(own), count, 0)
        return sources, jax.tree.map(lambda *leaves: jnp.stack(leaves), *afters)

    parts = jax.tree.map(lambda leaf: leaf.reshape(groups, size, *leaf.shape[1:]), stacked)
    sources, after = lax.scan(group, sources, (jnp.arange(groups), parts))
    return sources, jax.tree.map(lambda leaf: leaf.reshape(config.layers, *leaf.shape[2:]), after)
