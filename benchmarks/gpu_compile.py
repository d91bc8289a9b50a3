"""What the GPU kernels come to, compiled for an H200 that is not there: `make bench-gpu-compile`.

For each Mosaic kernel, at the 340M shapes: registers of a thread, bytes spilled, shared memory of a thread block, operands
and results counted from their shapes, and FLOPs of its products, each beside the floor's. The floor of the cache's read:
each visible pair once (tiles cut by the diagonal are computed whole), two products forward and five backward; tokens' rows
moved once, and none copied for the caches. A decoding step works in place: its bytes are counted by hand, those of a block
half full, and of a block's end. To add an operation, append to OPERATIONS.

Wants JAX's CUDA plugin; registers and spills want `ptxas` on the path besides (of the CUDA toolkit, or of the package
nvidia-cuda-nvcc).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from pallas_kernels.cache.gpu import cached_read
from pallas_kernels.delta_rule.gpu import delta_rule
from pallas_kernels.hola import Learned
from pallas_kernels.step import Memory
from pallas_kernels.step.gpu import evict, kernel, step
from train.config import RunError
from train.plan.topology import topology

B, T, H, C = 8, 2048, 4, 256
DECODED = 16  # rows of a decoding step
WIDTH = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "s8": 1, "u8": 1}
ABSENT = "-"


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of a kernel's products, and the floor's FLOPs and bytes. `moved`: its bytes, where operands and results are the
    same arrays and their shapes do not tell."""

    flops: int
    floor_flops: int
    floor_bytes: int
    moved: int | None = None


@dataclasses.dataclass(frozen=True)
class Operation:
    """name    as the table says it
    call     what is compiled: forward and backward, of a decoding step forward
    arrays   (shape, dtype) of its arguments
    work     of each kernel by its name; a kernel that is not there has no floor
    donated  arguments that are given away
    """

    name: str
    call: Callable[..., Any]
    arrays: list[tuple[tuple[int, ...], str]]
    work: dict[str, Work]
    donated: tuple[int, ...] = ()


def cache_read(width: int, window: int) -> Operation:
    def loss(queries: Any, keys: Any, values: Any, scores: Any, sink: Any, documents: Any) -> Any:
        out, _, _ = cached_read(queries, keys, values, scores, sink, documents=documents, window=window, block=C)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    tile, blocks = 64, B * H * T // C
    in_cache, in_block = -(-window // tile), C // tile
    computed = blocks * tile**2 * (in_cache * in_block + in_block * (in_block + 1) // 2)
    visible = blocks * (window * C + C * (C + 1) // 2)
    rows = B * H * T * width * 2  # bytes of one array of tokens in bfloat16

    def work(products: int, least: int, moved: int) -> Work:
        return Work(2 * width * products * computed, 2 * width * least * visible, moved * rows)

    tokens = ((B, T, H, width), "bfloat16")
    return Operation(
        f"cache K=V={width} W={window}",
        jax.grad(loss, argnums=(0, 1, 2, 4)),
        [tokens] * 3 + [((B, H, T), "float32"), ((H,), "float32"), ((B, T), "int32")],
        {
            "hola_cache_forward": work(2, 2, 4),
            "hola_cache_by_queries": work(3, 3, 5),
            "hola_cache_by_entries": work(4, 2, 2),
        },
    )


def gated_delta_rule(width: int) -> Operation:
    """Floors are those of all its kernels together (docs/performance.md), so no kernel has one here."""

    def loss(q: Any, k: Any, v: Any, beta: Any, decay: Any, initial: Any, documents: Any) -> Any:
        given = {"documents": documents, "initial": initial, "magnitude": "surprise"}
        out, score, final = delta_rule(q, k, v, beta, decay, scale=width**-0.5, normalise=True, **given)
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(final) + jnp.sum(score)

    tokens, gates = ((B, T, H, width), "bfloat16"), ((B, T, H), "float32")
    arrays = [tokens] * 3 + [gates] * 2 + [((B, H, width, width), "float32"), ((B, T), "int32")]
    return Operation(f"delta rule K=V={width}", jax.grad(loss, argnums=tuple(range(6))), arrays, {})


def decoding_step(width: int, window: int) -> Operation:
    """The floor: S both ways, the rows that may be read, and at a block's end the rows that compete read, the cache and the
    empty block written."""
    rows, item = DECODED * H, 2 * 2 * width
    call = kernel.Call(DECODED, H, H, C, window, width, width, 1.0, 1.0, jnp.bfloat16, None)

    def one(q: Any, k: Any, v: Any, beta: Any, decay: Any, document: Any, *memory: Any) -> Any:
        learned = Learned(jnp.ones(width), jnp.ones(width), jnp.zeros(H), jnp.zeros(H))
        return step(q, k, v, beta, decay, learned, Memory(*memory), document, scale=width**-0.5)

    token, gate, counts = ((DECODED, H, width), "bfloat16"), ((DECODED, H), "float32"), ((DECODED,), "int32")
    stores = [((DECODED, H, size, width), "bfloat16") for size in (window, window, C, C)]
    scores = [((DECODED, H, size), kind) for size, kind in ((window, "float32"), (window, "int32"), (C, "float32"))]
    weights = (DECODED, H, width, width), "float32"
    memory = [weights, *stores[:2], *scores[:2], *stores[2:], scores[2], *[counts] * 3]
    read = 2 * rows * width * 2 * (window + C // 2)
    through = 2 * rows * 3 * width**2
    floor, ends = rows * (8 * width**2 + item * (window + C // 2)), rows * item * 2 * (window + C)
    moves = 2 * rows * 2 * width * window * (window + C)
    return Operation(
        f"step K=V={width} W={window}",
        one,
        [*[token] * 3, *[gate] * 2, counts, *memory],
        {
            "hola_step_token": Work(through + read, through + read, floor, kernel.bytes_moved(call, C // 2)),
            "hola_step_evict": Work(moves, 0, ends, evict.bytes_moved(call)),
        },
        tuple(range(6, 6 + len(memory))),
    )


OPERATIONS: list[Callable[[], Operation]] = [
    functools.partial(gated_delta_rule, 256),
    functools.partial(gated_delta_rule, 128),
    functools.partial(gated_delta_rule, 64),
    functools.partial(cache_read, 256, 64),
    functools.partial(cache_read, 256, 256),
    functools.partial(cache_read, 128, 64),
    functools.partial(cache_read, 64, 64),
    functools.partial(decoding_step, 256, 64),
    functools.partial(decoding_step, 256, 256),
    functools.partial(decoding_step, 128, 64),
    functools.partial(decoding_step, 64, 64),
]


def bytes_of(shapes: str) -> int:
    """Of all arrays in a piece of HLO, such as `(bf16[8,4]{1,0}, f32[2]{0})`."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    return sum(WIDTH[kind] * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in found if kind in WIDTH)


def moved_by_kernel(program: str) -> dict[str, int]:
    """Bytes of operands and results of each Mosaic kernel in a compiled program."""
    moved = {}
    for line in program.splitlines():
        if 'custom_call_target="mosaic_gpu' not in line:
            continue
        result, rest = line.split("custom-call(", 1)
        operands = rest.split("operand_layout_constraints={", 1)[1].split("}, api_version", 1)[0]
        names = re.search(r'op_name="([^"]*)"', rest)
        assert names is not None, line[:300]
        moved[names[1].split("/")[-2]] = bytes_of(result) + bytes_of(operands)
    return moved


@dataclasses.dataclass(frozen=True)
class Assembled:
    """What the assembler and Mosaic tell of a kernel; None where they do not."""

    registers: int | None
    spilled: int | None
    shared: int | None


def assembled(folder: Path, name: str, ptxas: str | None) -> Assembled:
    """From the files that Mosaic leaves in a folder."""
    resources = next(iter(folder.glob(f"{name}_*.resources.txt")), None)
    shared = re.search(r"smem_scratch_bytes=(\d+)", resources.read_text()) if resources else None
    program = next(iter(folder.glob(f"{name}_*.ptx")), None)
    registers = spilled = None
    if ptxas and program:
        command = [ptxas, "-v", "-arch=sm_90a", "-o", os.devnull, os.fspath(program)]
        told = subprocess.run(command, capture_output=True, text=True, timeout=300)
        text = told.stdout + told.stderr
        if told.returncode:
            raise RuntimeError(f"ptxas refuses {program.name}: {text[-500:]}")
        registers = int(re.findall(r"Used (\d+) registers", text)[0])
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text.split("ptxas info", 1)[1]))
        raised = [int(n) for n in re.findall(r"setmaxnreg\.inc\.\S+ (\d+)", program.read_text())]
        registers = max([registers, *raised])
    return Assembled(registers, spilled, int(shared[1]) if shared else None)


def rows(operation: Operation, place: Any, ptxas: str | None) -> list[list[str]]:
    """A line of the table for each kernel."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in operation.arrays]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        with quiet():
            program = jax.jit(operation.call, donate_argnums=operation.donated).lower(*arrays).compile()
        moved = moved_by_kernel(program.as_text() or "")
        assert moved, f"no Mosaic kernel in {operation.name}"
        found = []
        for name, size in moved.items():
            told, work = assembled(Path(folder), name, ptxas), operation.work.get(name)
            counts = (told.registers, told.spilled, told.shared)
            size = size if work is None or work.moved is None else work.moved
            found.append([operation.name, name, *(ABSENT if n is None else f"{n:,}" for n in counts)])
            found[-1] += [f"{size / 2**20:.1f}", f"{work.floor_bytes / 2**20:.1f}" if work else ABSENT]
            found[-1] += [f"{n / 1e9:,.2f}" for n in (work.flops, work.floor_flops)] if work else [ABSENT, ABSENT]
    memory: Any = program.memory_analysis()
    print(f"{operation.name}: {memory.temp_size_in_bytes / 2**20:.0f} MiB of temporary memory", file=sys.stderr)
    return found


class quiet:
    """Keeps to itself that no disassembler was found, which Mosaic says to the process's own standard error."""

    def __enter__(self) -> None:
        sys.stderr.flush()
        self.saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)

    def __exit__(self, *_: object) -> None:
        os.dup2(self.saved, 2)
        os.close(self.saved)


TITLES = ["operation", "kernel", "registers", "spilled", "shared", "MiB", "floor", "GFLOP", "floor"]


def table(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [TITLES, *lines]) for i in range(len(TITLES))]
    return "\n".join(
        "  ".join(
            x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [TITLES, *lines]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="operations whose name has this in it")
    options = parser.parse_args(arguments)
    try:
        place = jax.sharding.SingleDeviceSharding(topology("h200:1x1").devices[0])
    except RunError as error:
        print(error, file=sys.stderr)
        return 1
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        print("ptxas is not found: registers and spills are left out (see --help)", file=sys.stderr)
    operations = [operation for make in OPERATIONS if options.only in (operation := make()).name]
    if not operations:
        print(f"no operation has {options.only!r} in its name: {[make().name for make in OPERATIONS]}", file=sys.stderr)
        return 1
    lines = [line for operation in operations for line in rows(operation, place, ptxas)]
    print(
        f"jax {jax.__version__}, compiled for one H200; B={B}, T={T}, H={H}, C={C}, bfloat16, forward and backward; "
        f"a step: B={DECODED}, one token"
    )
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
