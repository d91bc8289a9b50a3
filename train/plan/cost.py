"""What a compiled program does on one chip, loops as often as they run: operations, HBM traffic, collectives.

A kernel is an instruction outside fusions. What it reads and writes is counted from shapes, slices as what they take;
arrays that the compiler keeps in the chip's fast memory are not HBM traffic. A Pallas kernel's operations are those that its
author declared. A kernel takes as long as its products or its traffic, whichever is longer; copies that run beside the
kernels count as traffic alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from train.plan.chips import Chip
from train.plan.hlo import Computation, Instruction, Program
from train.plan.products import highest, product
from train.plan.trips import trips

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
SLICES = ("dynamic-slice", "slice", "gather")
UNKNOWN = 2**62  # cycles that the compiler gives where it has no estimate
# The share of a kernel's products that are float32 at the highest precision, by the beginning of its name. Of the fused
# memory they are the state path's: 0.6 at the paper's sizes (docs/performance.md).
EXACT = {"delta_rule": 1.0, "hola_forward": 0.6, "hola_backward": 0.6}
BESIDE = ("copy-start", "slice-start", "dynamic-slice-start")


@dataclasses.dataclass
class Cost:
    """flops        of matrix products, on one chip
    passes       the same, each float32 product as often as the chip must pass it
    traffic      bytes to and from the HBM
    kernels      kernels started
    roofline     seconds of the kernels, one after the other, each bound by its products or by its traffic
    seconds      the same, none shorter than the compiler's own estimate of it (TPU), which knows the vector units too
    collectives  (instruction, its computation, how often)
    unknown      loops whose number of rounds the program does not tell; counted as one
    """

    flops: float = 0.0
    passes: float = 0.0
    traffic: float = 0.0
    kernels: float = 0.0
    roofline: float = 0.0
    seconds: float = 0.0
    collectives: list[tuple[Instruction, Computation, float]] = dataclasses.field(default_factory=list)
    unknown: list[str] = dataclasses.field(default_factory=list)


def collective_kind(instruction: Instruction) -> str | None:
    """Of an instruction that begins or is a collective."""
    name = instruction.opcode.removesuffix("-start")
    return name if name in KINDS else None


def _far_bytes(instruction: Instruction) -> float:
    return sum(shape.bytes for shape in instruction.shapes if not shape.near)


class Walk:
    """Adds up a program's cost on a chip."""

    def __init__(self, program: Program, chip: Chip) -> None:
        self.program, self.chip, self.cost = program, chip, Cost()
        self._fused: dict[str, tuple[float, float]] = {}
        self._read: dict[tuple[str, str], float | None] = {}
        self._run(program.entry, 1.0)

    def _inner(self, instruction: Instruction, attribute: str = "calls") -> Computation | None:
        return self.program.computations.get(instruction.called(attribute) or "")

    def _bodies(self, computation: Computation, instruction: Instruction) -> Iterator[tuple[Computation, float]]:
        """(computation, how often) of what an instruction runs that is no fusion."""
        if instruction.opcode == "while":
            rounds = trips(self.program, computation, instruction)
            if rounds is None:
                self.cost.unknown.append(instruction.name)
            if body := self._inner(instruction, "body"):
                yield body, 1 if rounds is None else rounds
        elif instruction.opcode == "conditional":
            text = instruction.attribute(r"branch_computations=\{([^}]*)\}") or ""
            names = [name.strip(" %") for name in text.split(",")] if text else []
            names += [instruction.called(each) or "" for each in ("true_computation", "false_computation")]
            for name in dict.fromkeys(names):
                if branch := self.program.computations.get(name):
                    yield branch, 1  # all branches: more than is run
        elif instruction.opcode in ("call", "async-start") and (
            body := self._inner(instruction, "to_apply") or self._inner(instruction)
        ):
            yield body, 1

    def _run(self, computation: Computation, times: float) -> None:
        for each in computation.instructions.values():
            bodies = list(self._bodies(computation, each))
            for body, rounds in bodies:
                self._run(body, times * rounds)
            if each.opcode == "fusion":
                self._collectives_in(each, times)
            if collective_kind(each):
                self.cost.collectives.append((each, computation, times))
            elif not bodies and each.opcode not in FREE and not each.opcode.endswith("-done"):
                self._kernel(computation, each, times)

    def _collectives_in(self, fusion: Instruction, times: float) -> None:
        inner = self._inner(fusion)
        for each in inner.instructions.values() if inner else ():
            if collective_kind(each) and inner:
                self.cost.collectives.append((each, inner, times))

    def _kernel(self, computation: Computation, each: Instruction, times: float) -> None:
        traffic = self._traffic(computation, each)
        flops, passes = self._products(computation, each)
        cost, chip = self.cost, self.chip
        cost.flops += times * flops
        cost.passes += times * passes
        cost.traffic += times * traffic
        if each.opcode in BESIDE or (each.opcode == "custom-call" and not traffic):
            return
        cost.kernels += times
        moving = traffic / (chip.bandwidth * chip.memory_efficiency)
        bound = max(passes / (chip.flops * chip.matmul_efficiency), moving)
        cycles = float(each.attribute(r'"estimated_cycles":"(\d+)"') or 0)
        expected = cycles / chip.clock if chip.clock and cycles < UNKNOWN else 0.0
        cost.roofline += times * bound
        cost.seconds += times * max(bound, expected)

    def _products(self, computation: Computation, each: Instruction) -> tuple[float, float]:
        """(operations, operations as the chip passes them) of a kernel's matrix products."""
        if declared := each.attribute(r'"cost_estimate":\{"flops":"(\d+)"'):
            exact = next((share for name, share in EXACT.items() if each.name.startswith(name)), 0.0)
            return float(declared), float(declared) * (1 + exact * (self.chip.float32_passes[True] - 1))
        if found := product(each, computation):
            flops, operand = found
            return flops, flops * (self.chip.float32_passes[highest(each)] if operand.dtype == "f32" else 1.0)
        inner = self._inner(each) if each.opcode == "fusion" else None
        if inner is None:
            return 0.0, 0.0
        if inner.name not in self._fused:
            parts = [self._products(inner, part) for part in inner.instructions.values()]
            self._fused[inner.name] = (sum(part[0] for part in parts), sum(part[1] for part in parts))
        return self._fused[inner.name]

    def _traffic(self, computation: Computation, each: Instruction) -> float:
        if each.opcode in BESIDE:  # (destination, source, ...)
            source = computation.operand(each, 0)
            far = [not each.shapes[0].near, source is not None and not source.shapes[0].near]
            smaller = min(each.shapes[0].bytes, each.shapes[1].bytes if len(each.shapes) > 1 else each.shapes[0].bytes)
            return smaller * sum(far)
        if each.opcode in SLICES:
            return 2 * _far_bytes(each)
        if each.opcode == "dynamic-update-slice":
            update = computation.operand(each, 1)
            return 2 * _far_bytes(update) if update else 0.0
        inner = self._inner(each) if each.opcode == "fusion" else None
        return self._written(each, inner) + self._taken(computation, each, inner)

    def _written(self, each: Instruction, inner: Computation | None) -> float:
        roots = [inner.root] if inner else []
        if inner and inner.root.opcode == "tuple":
            roots = [inner.instructions[name] for name in inner.root.operands if name in inner.instructions]
        if len(roots) != len(each.shapes):
            return _far_bytes(each)
        total = 0.0
        for root, shape in zip(roots, each.shapes, strict=True):
            update = inner.operand(root, 1) if inner and root.opcode == "dynamic-update-slice" else None
            total += 0.0 if shape.near else shape.bytes if update is None else update.shapes[0].bytes
        return total

    def _taken(self, computation: Computation, each: Instruction, inner: Computation | None) -> float:
        total = 0.0
        for place, name in enumerate(each.operands):
            maker = computation.instructions.get(name)
            if maker is None:
                continue
            parameter = inner.parameters.get(place) if inner else None
            part = self._part(inner, parameter) if inner and parameter else None
            far = _far_bytes(maker)
            total += far if part is None else min(far, part)
        return total

    def _part(self, computation: Computation, source: Instruction) -> float | None:
        """Bytes of `source` that a fusion reads, where all it does with it is to take slices; None: all."""
        key = (computation.name, source.name)
        if key not in self._read:
            parts = [self._part_by(computation, source, user) for user in computation.users[source.name]]
            self._read[key] = None if None in parts else float(sum(part or 0 for part in parts))
        return self._read[key]

    def _part_by(self, computation: Computation, source: Instruction, user: Instruction) -> float | None:
        first = user.operands[:1] == [source.name] and user.operands.count(source.name) == 1
        if user.opcode in SLICES and first:
            return user.shapes[0].bytes
        if user.opcode in ("dynamic-update-slice", "scatter") and first:
            return 0.0
        if user.opcode in ("bitcast", "reshape", "copy"):
            return self._part(computation, user)
        inner = self._inner(user) if user.opcode == "fusion" else None
        if inner is None or user.operands.count(source.name) != 1:
            return None
        return self._part(inner, inner.parameters[user.operands.index(source.name)])


def cost(program: Program, chip: Chip) -> Cost:
    """What the program does on one chip."""
    return Walk(program, chip).cost
