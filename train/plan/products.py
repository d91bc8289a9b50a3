"""Operations of the matrix products in a compiled program, which each compiler spells in its own way."""

from __future__ import annotations

import math
import re

from train.plan.hlo import Computation, Instruction, Shape


def _listed(text: str, name: str) -> list[int]:
    found = re.search(rf'"?{name}"?[=:]\s*[{{\[]([\d,"\s]*)[}}\]]', text)
    return [int(number) for number in re.findall(r"\d+", found[1])] if found else []


def _sizes(window: str, name: str, default: str, axes: int) -> list[str]:
    found = re.search(rf"\b{name}=([\d_x\-]+)", window)
    return found[1].split("x") if found else [default] * axes


def _met(length: int, size: int, stride: int, pad: tuple[int, int], base: int, dilation: int) -> int:
    """Pairs of (place of the output, place of the kernel) along one axis that meet a number of the input: the batch of a
    product is spelt as such an axis, in which most pairs meet nothing."""
    whole = base * (length - 1) + 1
    outputs = max(0, (whole + sum(pad) - (dilation * (size - 1) + 1)) // stride + 1)
    places = (o * stride + k * dilation - pad[0] for o in range(outputs) for k in range(size))
    return sum(0 <= place < whole and place % base == 0 for place in places)


def _convolution(instruction: Instruction, left: Shape, right: Shape) -> float:
    labels = instruction.attribute(r"dim_labels=(\S+?)(?:,|$)") or ""
    lhs, rhs, out = re.split(r"_|->", labels)
    result = dict(zip(out, instruction.shapes[0].sizes, strict=True))
    given, kernel = dict(zip(lhs, left.sizes, strict=True)), dict(zip(rhs, right.sizes, strict=True))
    axes = sorted(letter for letter in rhs if letter.isdigit())
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    names = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    sizes, strides, pads, bases, dilations = (_sizes(window, *item, len(axes)) for item in names.items())
    met = 1
    for place, axis in enumerate(axes):
        low, high = map(int, pads[place].split("_"))
        numbers = (int(sizes[place]), int(strides[place]), (low, high), int(bases[place]), int(dilations[place]))
        met *= _met(given[axis], *numbers)
    return 2.0 * result["b"] * result["f"] * kernel["i"] * met


def product(instruction: Instruction, computation: Computation) -> tuple[float, Shape] | None:
    """(operations, an operand) of an instruction that is a matrix product."""
    target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
    library = "gemm" in target or "matmul" in target
    if instruction.opcode not in ("dot", "convolution") and not library:
        return None
    makers = [computation.operand(instruction, place) for place in (0, 1)]
    if makers[0] is None or makers[1] is None:
        return None
    left, right = makers[0].shapes[0], makers[1].shapes[0]
    if instruction.opcode == "convolution":
        return _convolution(instruction, left, right), left
    over = _listed(instruction.attributes, "lhs_contracting_dim(?:ension)?s")
    depth = math.prod(left.sizes[axis] for axis in over) if over else left.sizes[-1]
    return 2.0 * math.prod(instruction.shapes[0].sizes) * depth, left


def highest(instruction: Instruction) -> bool:
    """Whether a float32 product keeps all its digits."""
    return bool(re.search(r"operand_precision\W*[{\[:]\W*highest", instruction.attributes, re.IGNORECASE))
