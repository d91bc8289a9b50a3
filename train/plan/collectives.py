"""What chips tell each other in a step: which kind, along which mesh axes, how many bytes, how long."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from train.plan.cost import Cost, collective_kind
from train.plan.hlo import Computation, Instruction
from train.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind along the same axes, over a whole step.

    axes     of the mesh, such as "data x fsdp"
    count    of operations
    bytes    of one chip's part of what is gathered, reduced or sent, summed over them
    seconds  if nothing else ran
    exposed  seconds for which nothing else can run, as the compiler ordered it
    """

    kind: str
    axes: str
    count: float
    bytes: float
    seconds: float
    exposed: float


def groups(instruction: Instruction) -> list[list[int]]:
    """The groups of devices that talk, or the pairs of a permutation, as numbers in the mesh's order."""
    text = instruction.attributes
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, sizes, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
        numbers = np.arange(math.prod(sizes or [])).reshape(sizes or [])
        grouped: list[list[int]] = (numbers.transpose(order) if order else numbers).reshape(shape or []).tolist()
        return grouped
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", text)
    inner = re.findall(r"\{([\d,]+)\}", found[1]) if found else []
    return [[int(n) for n in group.split(",")] for group in inner]


def axes_of(instruction: Instruction, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which an instruction talks; no groups mean all."""
    several = tuple(name for name, size in mesh.shape.items() if size > 1)
    if found := re.search(r"replica_groups=mesh\[[^\]]*\] ?\{([^}]*)\}", instruction.attributes):
        named = re.findall(r"'([^']+)'", found[1])
        if set(named) <= set(mesh.shape):
            return tuple(name for name in several if name in named)
    talking = groups(instruction)
    if not talking:
        return several
    places = np.array([np.unravel_index(group, mesh.devices.shape) for group in talking if len(group) > 1])
    if not places.size:
        return ()
    varies = (places != places[:, :, :1]).any(axis=(0, 2))
    return tuple(name for name, moves in zip(mesh.axis_names, varies, strict=True) if moves)


def payload(instruction: Instruction, computation: Computation, size: int) -> float:
    """Bytes that one chip holds of what is talked about: the whole of what is gathered, reduced or scattered."""
    makers = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
    given = sum(shape.bytes for maker in makers for shape in maker.shapes)
    return given * size if collective_kind(instruction) == "all-gather" else given


def group_of(mesh: Mesh, axes: Iterable[str]) -> np.ndarray:
    """The devices of one group along these axes."""
    index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    return np.atleast_1d(mesh.devices[index]).ravel()


def bandwidth(topology: Topology, devices: np.ndarray) -> float:
    """Bytes per second that each chip of a group can send to the others."""
    chip = topology.chip
    if chip.kind == "gpu":
        hosts = len({device.process_index for device in devices})
        each = len(devices) / hosts
        found = chip.link if hosts == 1 else min(chip.link, chip.network * each)
    elif chip.kind == "tpu":
        along = np.array([device.coords for device in devices])
        crossed = [axis for axis in range(len(topology.sizes)) if len(set(along[:, axis])) > 1]
        # A ring of all chips of an axis is sent around both ways at once; a line, or a part of a ring, has one way.
        rings = [len(set(along[:, a])) == topology.sizes[a] and topology.sizes[a] % chip.wraps == 0 for a in crossed]
        found = chip.link * sum(2 if ring else 1 for ring in rings)
    else:
        found = chip.link
    return found * chip.memory_efficiency


SENT = {  # share of the payload that a chip of n sends
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


def seconds(kind: str, size: float, count: int, speed: float) -> float:
    """Of one collective of `size` bytes among `count` chips."""
    return SENT[kind](count) * size / speed if count > 1 and speed else 0.0


def collectives(cost: Cost, mesh: Mesh, topology: Topology) -> list[Collective]:
    """The step's, the slowest first. What the compiler starts and awaits apart may hide behind the kernels."""
    found: dict[tuple[str, str], list[float]] = {}
    for instruction, computation, times in cost.collectives:
        kind, axes = collective_kind(instruction) or "", axes_of(instruction, mesh)
        if not axes:
            continue
        devices = group_of(mesh, axes)
        size = payload(instruction, computation, devices.size)
        if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
            kind = "reduce-scatter"
        took = seconds(kind, size, devices.size, bandwidth(topology, devices))
        hidden = instruction.opcode.endswith("-start") or "async" in computation.name
        total = found.setdefault((kind, " x ".join(axes)), [0.0] * 4)
        for place, amount in enumerate((1.0, size, took, 0.0 if hidden else took)):
            total[place] += times * amount
    made = [Collective(kind, axes, *total) for (kind, axes), total in found.items()]
    return sorted(made, key=lambda each: -each.seconds)
