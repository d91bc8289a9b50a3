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
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from hola_jax.array_types import Array, Float, Int
from hola_jax.config import ModelConfig, nearest_divisor, residual_blocks

MIXER, MLP = 0, 1  # the sub-layers of a block
ABSENT = -1e30  # a logit whose power is zero, without inf - inf where nothing is there


class Residual(Protocol):
    """What a block asks of the rule that joins its sub-layers. `x` is whatever passes from layer to layer."""

    def read(self, x: Array, sublayer: int) -> Float[Array, "B T D"]: ...

    def add(self, x: Array, y: Float[Array, "B T D"], sublayer: int) -> Array: ...


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
    """Of a softmax over sources, what some of them bring; any parts of one softmax can be joined, in any order."""

    top: Float[Array, "... B T"]  # the largest logit
    mass: Float[Array, "... B T"]  # sum of exp(logit - top)
    total: Float[Array, "... B T D"]  # sum of exp(logit - top) source

    def joined(self, other: Part) -> Part:
        top = jnp.maximum(self.top, other.top)
        ours, theirs = jnp.exp(self.top - top), jnp.exp(other.top - top)
        total = ours[..., None] * self.total + theirs[..., None] * other.total
        return Part(top, ours * self.mass + theirs * other.mass, total)

    def mean(self) -> Float[Array, "... B T D"]:
        return self.total / self.mass[..., None]


def logits(
    directions: Float[Array, "R D"], sources: Float[Array, "S B T D"], epsilon: float
) -> Float[Array, "R S B T"]:
    """query' RMSNorm(source) of R readers; a direction is the query times the norm's scale."""
    x = sources.astype(jnp.float32)
    products = jnp.einsum("rd,sbtd->rsbt", directions, x, precision=lax.Precision.HIGHEST)
    return products * lax.rsqrt(jnp.mean(x * x, axis=-1) + epsilon)


def look(
    directions: Float[Array, "R D"], sources: Float[Array, "S B T D"], count: Int[Array, ""], epsilon: float
) -> Part:
    """What R readers find in the first `count` sources; each field has an axis R in front."""
    there = jnp.arange(sources.shape[0]) < count
    found = jnp.where(there[:, None, None], logits(directions, sources, epsilon), ABSENT)
    top = lax.stop_gradient(jnp.max(found, axis=1))
    powers = jnp.exp(found - top[:, None])
    total = jnp.einsum("rsbt,sbtd->rbtd", powers, sources.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return Part(top, jnp.sum(powers, axis=1), total)


@partial(jax.checkpoint, static_argnums=3)
def lookback(
    directions: Float[Array, "R D"], sources: Float[Array, "S B T D"], count: Int[Array, ""], epsilon: float
) -> Part:
    """`look`, of which the backward pass keeps the sources alone, and those in their own type."""
    return look(directions, sources, count, epsilon)


@partial(jax.checkpoint, static_argnums=4)
def joined_read(
    earlier: Part,
    direction: Float[Array, " D"],
    sources: Float[Array, "S B T D"],
    count: Int[Array, ""],
    epsilon: float,
) -> Float[Array, "B T D"]:
    """What one reader finds in sources of which the `earlier` ones are looked at already; in the type of the others."""
    own = jax.tree.map(lambda leaf: leaf[0], look(direction[None], sources, count, epsilon))
    return earlier.joined(own).mean().astype(sources.dtype)


class View(NamedTuple):
    """What a layer's two readers know beforehand; leading axis g for the layers of a group."""

    directions: Float[Array, "2 D"]
    earlier: Part  # leading axis 2: what they find in the sources from before the group
    counts: Int[Array, " 2"]  # how many of the group's own sources are there
    slots: Int[Array, " 2"]  # and to which of those their outputs are added


class Attentive(NamedTuple):
    """The rule inside of one layer: `x` is the group's own sources [S B T D]."""

    view: View
    epsilon: float

    def read(self, x: Float[Array, "S B T D"], sublayer: int) -> Float[Array, "B T D"]:
        view = jax.tree.map(lambda leaf: leaf[sublayer], self.view)
        return joined_read(view.earlier, view.directions, x, view.counts, self.epsilon)

    def add(self, x: Float[Array, "S B T D"], y: Float[Array, "B T D"], sublayer: int) -> Float[Array, "S B T D"]:
        slot = self.view.slots[sublayer]
        return lax.dynamic_update_index_in_dim(x, lax.dynamic_index_in_dim(x, slot, keepdims=False) + y, slot, 0)


class Depths(NamedTuple):
    """Where the sub-layers of a group read and write, counted from the group's first source."""

    group: int  # layers
    sources: int  # to which the group's sub-layers add
    counts: np.ndarray  # [g, 2]
    slots: np.ndarray  # [g, 2]


def depths(config: ModelConfig, tokens: int) -> Depths:
    """One token has all layers in one group: its sources are small, and a state that is changed in place stays whole."""
    block = 1 if config.residual == "attention" else 2 * config.layers // residual_blocks(config)  # in sub-layers
    if tokens == 1:
        group = config.layers
    elif block > 1:
        group = block // 2
    else:
        group = nearest_divisor(config.layers, math.sqrt(config.layers))
    numbers = np.arange(2 * group).reshape(group, 2)
    slots = numbers // block
    return Depths(group, 2 * group // block, (slots + (numbers % block > 0)).astype(np.int32), slots.astype(np.int32))


Through = Callable[[Array, Any, Any], tuple[Array, Any]]


def attend_over_depth(
    config: ModelConfig,
    through: Through,
    x: Float[Array, "B T D"],
    layers: dict[str, Any],
    states: Any,
    last: Read,
) -> tuple[Float[Array, "B T D"], Any]:
    """(what the reader `last` finds in all sources, what the layers return besides).

    through  (sources, (parameters, view), states) of some layers to (sources, ...): runs them in order
    layers   parameters of all layers, stacked; those of their readers must be whole
    """
    plan, epsilon = depths(config, x.shape[1]), config.norm_epsilon
    both = [layers[name]["query"] * layers[name]["scale"] for name in ("mixer_read", "mlp_read")]
    directions = jnp.stack(both, axis=1)  # [N 2 D]

    def group(
        sources: Array, count: Int[Array, ""] | int, layers: Any, states: Any, directions: Float[Array, "g 2 D"]
    ) -> tuple[Array, Any]:
        earlier = lookback(directions.reshape(-1, x.shape[-1]), sources, jnp.asarray(count), epsilon)
        earlier = jax.tree.map(lambda leaf: leaf.reshape(plan.group, 2, *leaf.shape[1:]), earlier)
        view = View(directions, earlier, jnp.asarray(plan.counts), jnp.asarray(plan.slots))
        own = jnp.zeros((plan.sources, *x.shape), x.dtype)
        return through(own, (layers, view), states)

    def step(sources: Array, given: tuple[Array, Any]) -> tuple[Array, Any]:
        number, parts = given
        first = 1 + number * plan.sources
        own, after = group(sources, first, *parts)
        return lax.dynamic_update_slice_in_dim(sources, own, first, 0), after

    if plan.group == config.layers:
        own, after = group(x[None], 1, layers, states, directions)
        sources = jnp.concatenate([x[None], own])
    else:
        groups = config.layers // plan.group
        parts = jax.tree.map(lambda leaf: leaf.reshape(groups, -1, *leaf.shape[1:]), (layers, states, directions))
        sources = jnp.zeros((1 + groups * plan.sources, *x.shape), x.dtype).at[0].set(x)
        sources, after = lax.scan(step, sources, (jnp.arange(groups), parts))
        after = jax.tree.map(lambda leaf: leaf.reshape(config.layers, *leaf.shape[2:]), after)
    everything = jnp.asarray(sources.shape[0])
    found = lookback((last.query[...] * last.scale[...])[None], sources, everything, epsilon).mean()
    return found[0].astype(x.dtype), after
