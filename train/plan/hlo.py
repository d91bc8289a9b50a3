"""A compiled program's text as computations and instructions: what `cost` walks over."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cached_property

STARTED = ("fusion-start", "call-start", "custom-call-start")
BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array; `near` where it lies in a chip's fast memory and not in the HBM."""

    dtype: str
    sizes: tuple[int, ...]
    near: bool = False

    @property
    def bytes(self) -> float:
        digits = re.search(r"\d+", self.dtype)
        bits = BITS.get(self.dtype, int(digits[0]) if digits else 8)
        return math.prod(self.sizes) * bits / 8


def shapes(text: str) -> list[Shape]:
    """The arrays of a type, tuples flattened."""
    return [
        Shape(kind, tuple(int(size) for size in sizes.split(",") if size), bool(re.search(r"S\([1-9]", layout or "")))
        for kind, sizes, layout in _ARRAY.findall(text)
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line: %name = type opcode(operands), attributes."""

    name: str
    opcode: str
    type: str
    arguments: str
    attributes: str
    root: bool

    @cached_property
    def shapes(self) -> list[Shape]:
        return shapes(self.type)

    @cached_property
    def operands(self) -> list[str]:
        return _NAME.findall(self.arguments)

    def called(self, attribute: str = "calls") -> str | None:
        """The computation that an attribute such as calls=%name names."""
        found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """A function of the program; its instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        return next(each for each in self.instructions.values() if each.root)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for each in self.instructions.values():
            for operand in dict.fromkeys(each.operands):
                if operand in found:
                    found[operand].append(each)
        return found

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(each.arguments): each for each in self.instructions.values() if each.opcode == "parameter"}

    def operand(self, instruction: Instruction, index: int) -> Instruction | None:
        """The instruction that makes an operand."""
        return self.instructions.get(instruction.operands[index]) if index < len(instruction.operands) else None


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations, and the one that runs first."""

    computations: dict[str, Computation]
    entry: Computation


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(f"no closing bracket in {text[:80]!r}")


def _elements(text: str) -> list[str]:
    """The parts of a tuple's type."""
    depth, found = 0, [""]
    for letter in text[1:-1]:
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(letter, 0)
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return found


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
    operation = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if not operation:
        return None
    start = end + operation.end() - 1
    stop = _closing(rest, start)
    opcode, kind = operation[1], rest[:end]
    if opcode in STARTED:  # on another queue, awaited by a `-done`: of type (arguments, result, ...)
        opcode, kind = opcode.removesuffix("-start"), _elements(kind)[1]
    return Instruction(head[2], opcode, kind, rest[start + 1 : stop], rest[stop + 1 :], bool(head[1]))


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = head[2]
            entry = name if head[1] else entry
            computations[name] = Computation(name, {})
        elif name and (found := _instruction(line)):
            computations[name].instructions[found.name] = found
    if not entry:
        raise ValueError("this is no compiled program: it has no ENTRY")
    return Program(computations, computations[entry])
