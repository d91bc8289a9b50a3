"""How often a loop runs: the compiler's own word where it gives it, else what the loop's condition says."""

from __future__ import annotations

from train.plan.hlo import Computation, Instruction, Program


def _constant(computation: Computation, name: str) -> int | None:
    """The integer that an instruction is, seen through copies."""
    while found := computation.instructions.get(name):
        if found.opcode == "constant":
            text = found.arguments.strip()
            return int(text) if text.lstrip("-").isdigit() else None
        if found.opcode not in ("copy", "bitcast", "convert") or not found.operands:
            return None
        name = found.operands[0]
    return None


def _from_outside(
    condition: Computation, name: str, loop: Instruction, around: Computation
) -> tuple[int | None, int | None]:
    """(place in the loop's tuple, its first value) of what a condition reads there."""
    found = condition.instructions.get(name)
    place = found.attribute(r"index=(\d+)") if found and found.opcode == "get-tuple-element" else None
    if place is None:
        return None, None
    start = around.operand(loop, 0)
    known = start is not None and start.opcode == "tuple" and int(place) < len(start.operands)
    return int(place), _constant(around, start.operands[int(place)]) if known and start else None


def _compared(program: Program, condition: Computation) -> tuple[str, list[str]]:
    """(direction, the two things) that a condition compares, seen through a fusion around the comparison."""
    root, names = condition.root, condition.root.operands
    inner = program.computations.get(root.called() or "")
    if inner is not None and inner.root.opcode == "compare":
        order = [inner.instructions[name] for name in inner.root.operands if name in inner.instructions]
        if all(each.opcode == "parameter" for each in order):
            names = [root.operands[int(each.arguments)] for each in order]
        root = inner.root
    return root.attribute(r"direction=(\w+)") or "", names


def trips(program: Program, around: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs its body; None where the text does not tell."""
    if told := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(told)
    condition = program.computations[loop.called("condition") or ""]
    direction, names = _compared(program, condition)
    if direction not in ("LT", "GT") or len(names) != 2:
        return None
    counter, bound = names if direction == "LT" else reversed(names)
    place, first = _from_outside(condition, counter, loop, around)
    last = _constant(condition, bound)
    if last is None:
        last = _from_outside(condition, bound, loop, around)[1]
    if place is None or last is None:
        return None
    return max(0, last - (first or 0))  # a loop made by JAX counts from 0 by 1
