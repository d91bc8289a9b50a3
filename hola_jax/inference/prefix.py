"""The memory of prefixes: what a model remembers of each row of a batch, and what it expects next.

A memory is a pytree of constant size (with softmax attention: of the size of its capacity) and its rows are independent:
they can be picked, repeated, dropped, joined and written into the slots of another batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hola_jax.array_types import Array, Bool, Float, Int32
from hola_jax.config import ModelConfig
from hola_jax.model import init_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What the compiled programs take and give; rows beyond a batch's are empty."""

    state: Any  # the mixers', each array [N, B, ...]
    logits: Float[Array, "B E"]  # float32, of the token that comes next
    seen: Bool[Array, "B E"]  # which tokens the row holds
    position: Int32[Array, " B"]  # tokens read


def empty(config: ModelConfig, width: int) -> Memory:
    """The memory of empty prefixes."""
    table = (width, config.vocab_size)
    position = jnp.zeros(width, jnp.int32)
    return Memory(init_state(config, width), jnp.zeros(table, jnp.float32), jnp.zeros(table, bool), position)


new_memory = jax.jit(empty, static_argnums=(0, 1))


def _by_rows(change: Any, *memories: Memory) -> Memory:
    """`change(axis, *arrays)` for each array, `axis` being that of the rows."""
    state = jax.tree.map(partial(change, 1), *(memory.state for memory in memories))
    rest = [[m.logits for m in memories], [m.seen for m in memories], [m.position for m in memories]]
    return Memory(state, *(change(0, *arrays) for arrays in rest))


@jax.jit
def _take(memory: Memory, rows: Array) -> Memory:
    return _by_rows(lambda axis, x: jnp.take(x, rows, axis=axis, mode="clip"), memory)


@jax.jit
def _concatenate(memories: list[Memory]) -> Memory:
    return _by_rows(lambda axis, *parts: jnp.concatenate(parts, axis=axis), *memories)


@partial(jax.jit, donate_argnums=0)
def write_row(memory: Memory, slot: Array, other: Memory, row: Array) -> Memory:
    """`memory`, which is used up, with the given row of `other` in `slot`."""

    def change(axis: int, x: Array, y: Array) -> Array:
        one = jax.lax.dynamic_slice_in_dim(y, row, 1, axis)
        return jax.lax.dynamic_update_slice_in_dim(x, one, slot, axis)

    return _by_rows(change, memory, other)


def _kind(memory: Memory) -> Any:
    """What two memories have in common when their rows may stand in one batch."""
    one = [(x.shape[0], *x.shape[2:], x.dtype) for x in jax.tree.leaves(memory.state)]
    return jax.tree.structure(memory), one, memory.logits.shape[1]


def width_of(batch: int, least: int = 1) -> int:
    """Rows that a batch is computed with: the next power of two, so that few widths are ever compiled."""
    return max(least, 1 << (batch - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The memory of a batch of prefixes. Immutable: reading on or generating from it leaves it as it is."""

    memory: Memory
    batch: int  # rows that count; the memory may be wider

    def __len__(self) -> int:
        return self.batch

    @property
    def positions(self) -> list[int]:
        """Tokens read, for each row."""
        return [int(x) for x in np.asarray(self.memory.position)[: self.batch]]

    @property
    def nbytes(self) -> int:
        """Bytes of one row's memory; they do not depend on how long the prefix is."""
        width = self.memory.position.shape[0]
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.memory)) // width

    def rows(self, indices: Sequence[int], least_width: int = 1) -> Prefix:
        """The named rows, in that order: `[0] * 8` branches, leaving one out drops it."""
        if not len(indices):
            raise ValueError("no rows are named; a batch has at least one")
        for index in indices:
            if not 0 <= index < self.batch:
                raise ValueError(f"row {index} is not one of the {self.batch} rows, 0 to {self.batch - 1}")
        width = width_of(len(indices), least_width)
        padded = np.array([*indices, *[indices[0]] * (width - len(indices))], np.int32)
        return Prefix(_take(self.memory, padded), len(indices))

    def insert(self, row: int, other: Prefix) -> Prefix:
        """With the rows of `other`, of the same model, in front of `row`."""
        if not 0 <= row <= self.batch:
            raise ValueError(f"row {row} is not a place between the {self.batch} rows, 0 to {self.batch}")
        if _kind(self.memory) != _kind(other.memory):
            raise ValueError("the rows to insert are the memory of another model")
        both = Prefix(_concatenate([self.memory, other.memory]), self.memory.position.shape[0] + other.batch)
        first = self.memory.position.shape[0]
        order = [*range(row), *range(first, first + other.batch), *range(row, self.batch)]
        return both.rows(order)

    def drop(self, row: int) -> Prefix:
        """Without that row."""
        if not 0 <= row < self.batch:
            raise ValueError(f"row {row} is not one of the {self.batch} rows, 0 to {self.batch - 1}")
        return self.rows([index for index in range(self.batch) if index != row])


def joined(prefixes: Sequence[Prefix]) -> Prefix:
    """One batch of the rows of each, in that order."""
    if len(prefixes) == 1:
        return prefixes[0]
    sources = [(prefix, row) for prefix in prefixes for row in range(len(prefix))]
    memory = prefixes[0].rows([0] * len(sources)).memory
    for slot, (prefix, row) in enumerate(sources):
        if prefix is not prefixes[0] or row:
            memory = write_row(memory, np.int32(slot), prefix.memory, np.int32(row))
    return Prefix(memory, len(sources))
