"""What lies in a chip's memory during a step, by kind, and whether there is room."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from train.layout import Layout


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    parameters, moments  of the state; `state` the rest of it
    batch                tokens, targets, segments, mask
    temporaries          activations, gradients, gathered parameters: what the compiler makes room for
    output               results that do not lie where an argument lay
    code                 the program
    padding              what the chip's tiles add to the arguments
    """

    parameters: float
    moments: float
    state: float
    batch: float
    temporaries: float
    output: float
    code: float
    padding: float

    @property
    def total(self) -> float:
        return float(sum(dataclasses.astuple(self)))


def part_bytes(tree: Any) -> int:
    """Bytes that one device holds of shapes with shardings."""

    def part(x: jax.ShapeDtypeStruct) -> int:
        shape: tuple[int, ...] = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(part(x) for x in jax.tree.leaves(tree))


def memory(compiled: jax.stages.Compiled, layout: Layout, rows: int, tokens: int) -> Memory:
    """Of the compiled step."""
    state, found = layout.abstract_state(), compiled.memory_analysis()
    parameters, batch = part_bytes(state["params"]), part_bytes(layout.abstract_batch(rows, tokens))
    moments = part_bytes((state["optimizer"]["mu"], state["optimizer"]["nu"]))
    rest = part_bytes(state) - parameters - moments

    def size(name: str) -> float:
        return float(getattr(found, f"{name}_size_in_bytes", 0))

    return Memory(
        parameters=parameters,
        moments=moments,
        state=rest,
        batch=batch,
        temporaries=size("temp"),
        output=max(0.0, size("output") - size("alias")),
        code=size("generated_code"),
        padding=max(0.0, size("argument") - parameters - moments - rest - batch),
    )
