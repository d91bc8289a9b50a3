"""What LoLA's memory is made of: its trainables, and its state of constant size."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hola_jax.array_types import Array, Bool, Float, Int32
from hola_jax.memory.state import EMPTY, MemoryConfig

LEAST_FEATURE = 1e-12  # below which no feature falls
LEAST_MASS = 1e-6  # added to what is divided by


class LolaParams(NamedTuple):
    """What the memory learns."""

    query_features: Float[Array, "H K F"]
    key_features: Float[Array, "H K F"]
    mix_logit: Float[Array, " H"]  # w = sigmoid of it: the weight of exact pairs, 1 - w that of absorbed ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LolaState:
    """All that a layer remembers of a prefix; its size does not depend on how long the prefix was.

    E = 2 F. A token of the running block is visible while its position is at least `document_start`; all else is the last
    document's.
    """

    associations: Float[Array, "B H E V"]  # H, float32: of all pairs of the document that are not exact any more
    mass: Float[Array, "B H E"]  # s, float32
    cache_keys: Float[Array, "B H W K"]  # best score first
    cache_values: Float[Array, "B H W V"]
    cache_positions: Int32[Array, "B H W"]  # EMPTY where a row is empty
    block_keys: Float[Array, "B H C K"]
    block_values: Float[Array, "B H C V"]
    position: Int32[Array, " B"]  # real tokens seen so far
    document: Int32[Array, " B"]  # segment id of the last real token; 0 before any
    document_start: Int32[Array, " B"]  # position at which that document began
    spoilt: Bool[Array, "B H"]  # whether that document held NaN or inf, which all the others lack

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def init_lola_state(
    config: MemoryConfig,
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    feature_dim: int,
    dtype: DTypeLike = jnp.float32,
) -> LolaState:
    """The memory of an empty prefix; `dtype` is that of the exact keys and values (H and s are float32)."""
    features = 2 * feature_dim

    def zeros(*shape: int, dtype: DTypeLike = dtype) -> Array:
        return jnp.zeros((batch, *shape), dtype)

    return LolaState(
        associations=zeros(heads, features, value_dim, dtype=jnp.float32),
        mass=zeros(heads, features, dtype=jnp.float32),
        cache_keys=zeros(heads, config.window, key_dim),
        cache_values=zeros(heads, config.window, value_dim),
        cache_positions=jnp.full((batch, heads, config.window), EMPTY, jnp.int32),
        block_keys=zeros(heads, config.block, key_dim),
        block_values=zeros(heads, config.block, value_dim),
        position=zeros(dtype=jnp.int32),
        document=zeros(dtype=jnp.int32),
        document_start=zeros(dtype=jnp.int32),
        spoilt=zeros(heads, dtype=jnp.bool_),
    )
