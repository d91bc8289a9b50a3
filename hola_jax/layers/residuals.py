"""How sub-layers are joined over depth: the plain sum, or Attention Residuals (arXiv 2603.15031), full and in blocks.

A sub-layer is a mixer or an MLP with its norms; it reads one vector per token and answers with one. In place of one running
sum there are sources: the first is the embedding, and each sub-layer's output is added to one of the others, to its own
(full) or to its block's (so a block's source is the plain sum inside of it). What a sub-layer reads is a softmax over the
sources that are there, with a learned query against their norms, per token and in float32.

Queries are parameters, so they are known before the layers run. Layers go in groups: all readers of a group look at once at
the sources from before it, and each joins to that what it finds among the group's own. That is the same softmax in two
parts, and the sources are gone over once per group and not once per reader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from hola_jax.array_types import Array, Float, Int
from hola_jax.config import ModelConfig, memory_work, residual_blocks, residual_group
from hola_jax.layers.depth_reads import Looks, Parts, Trail, begun, ended, join, look, look_along
from hola_jax.layers.vectors import made_first
from hola_jax.memory.kernels import OverDepth, choose, depth_kernels

MIXER, MLP = 0, 1  # the sub-layers of a block


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


def _at(tree: Any, index: int | slice) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


@partial(
    jax.tree_util.register_dataclass, data_fields=["directions", "earlier"], meta_fields=["sums", "epsilon", "kernels"]
)
@dataclass(frozen=True)
class InGroup:
    """The rule inside a layer of a group. `x` is the group's own sources: its block's sum, or every output."""

    directions: Float[Array, "2 D"]
    earlier: Parts  # what the layer's two readers find in the sources from before the group
    sums: bool
    epsilon: float
    kernels: OverDepth | None

    def read(self, x: tuple[Array, ...], sublayer: int) -> Float[Array, "B T D"]:
        return join(self.directions[sublayer], self.earlier[sublayer], x, self.epsilon, self.kernels)

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
        direction = self.directions[sublayer]
        part = look(direction[None], x, self.epsilon, self.counts[sublayer])[0]
        return join(direction, part, (), self.epsilon, None)

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
    block = 1 if config.residual == "attention" else sublayers // residual_blocks(config)
    both = [layers[name]["query"] * layers[name]["scale"] for name in ("mixer_read", "mlp_read")]
    directions = jnp.stack(both, axis=1)  # [N 2 D]
    sources = jnp.zeros((1 + sublayers // block, *x.shape), x.dtype)
    sources = lax.dynamic_update_index_in_dim(sources, x, 0, 0)
    final = last.query[...] * last.scale[...]
    if x.shape[1] == 1:
        numbers = jnp.arange(sublayers).reshape(-1, 2)
        slots = 1 + numbers // block
        rules = OfOneToken(directions, slots + (numbers % block > 0), slots, config.norm_epsilon)
        sources, after = through(sources, ((layers, rules), states))
        parts = look(final[None], sources, config.norm_epsilon)
    else:
        trail, after = _in_groups(config, layer, begun(sources), (layers, directions, states))
        looks = Looks((len(sources),), config.norm_epsilon, _kernels(config, 1, sources))
        parts, trail = look_along(final[None], trail, jnp.int32(0), looks)
        parts = ended(trail, parts)
    return join(final, parts[0], (), config.norm_epsilon, None), after


def _kernels(config: ModelConfig, readers: int, sources: Float[Array, "S B T D"]) -> OverDepth | None:
    """Those of the memory's platform, where the memory runs by kernels."""
    work = memory_work(config)
    if work is None:
        return None
    _, _, tokens, dim = sources.shape
    return depth_kernels(choose(config.implementation, work).name, readers, tokens, dim, sources.dtype.name)[0]


def _in_groups(config: ModelConfig, layer: Layer, trail: Trail, stacked: tuple[Any, Array, Any]) -> tuple[Trail, Any]:
    """A scan over groups of `size` layers, which are written out: a scan of them would keep what it keeps twice."""
    size = residual_group(config)
    groups = config.layers // size
    own_sources = (len(trail.sources) - 1) // groups
    counts = tuple(1 + number * own_sources for number in range(groups))
    looks = Looks(counts, config.norm_epsilon, _kernels(config, 2 * size, trail.sources))

    def group(trail: Trail, given: tuple[Array, tuple[Any, Array, Any]]) -> tuple[Trail, Any]:
        number, (layers, directions, states) = given
        number, directions = made_first((number, directions))
        earlier, trail = look_along(directions.reshape(2 * size, -1), trail, number, looks)
        own: tuple[Array, ...] = ()
        afters = []
        for i in range(size):
            params, way, state = _at((layers, directions, states), i)
            rule = InGroup(way, earlier[2 * i : 2 * i + 2], own_sources == 1, config.norm_epsilon, looks.kernels)
            own, after = layer(own, ((params, rule), state))
            afters.append(after)
        sources = lax.dynamic_update_slice_in_dim(trail.sources, jnp.stack(own), 1 + number * own_sources, 0)
        return trail._replace(sources=sources), jax.tree.map(lambda *leaves: jnp.stack(leaves), *afters)

    parts = jax.tree.map(lambda leaf: leaf.reshape(groups, size, *leaf.shape[1:]), stacked)
    trail, after = lax.scan(group, trail, (jnp.arange(groups), parts))
    return trail, jax.tree.map(lambda leaf: leaf.reshape(config.layers, *leaf.shape[2:]), after)
