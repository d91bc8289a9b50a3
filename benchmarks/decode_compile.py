"""What one decoded token moves, compiled for chips that are not there: `python benchmarks/decode_compile.py`.

A layer's memory at the 340M sizes, given away, as a loop over tokens does, with the running block full. Counted from the
compiled program's shapes, as in `hola plan`; of our kernels, which change the memory in place, by what they copy. What
stands in conditionals (a document begins, a block ends) is counted apart. The floor: S both ways, and the rows that may be
read.

Wants libtpu for TPUs and JAX's CUDA plugin for the H200.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from hola_jax.memory import CacheParams, MemoryConfig, hola_memory, init_state
from pallas_kernels.step import kernel as tpu
from pallas_kernels.step.gpu import kernel as gpu
from train.config import RunError
from train.plan import hlo
from train.plan.cost import cost
from train.plan.topology import Topology, topology

CHIPS = {"v5e": ("v5e:2x2", "pallas_tpu"), "h200": ("h200:1x1", "pallas_gpu")}
CONFIG = MemoryConfig()
H, WIDTH = 4, 256
COLUMNS = ("chip", "B", "by", "moved MB", "of floor", "floor MB", "in conditionals MB", "started", "temporary MiB")


def arrays(batch: int) -> tuple[Any, ...]:
    """q, k, v, beta, log decay, parameters, documents, state."""

    def array(*shape: int, dtype: str = "bfloat16") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens, gates = [array(batch, 1, H, WIDTH)] * 3, [array(batch, 1, H, dtype="float32")] * 2
    params = CacheParams(*(array(size, dtype="float32") for size in (WIDTH, WIDTH, H, H)))
    state = jax.eval_shape(lambda: init_state(CONFIG, batch, H, WIDTH, WIDTH, jnp.bfloat16))
    return *tokens, *gates, params, array(batch, 1, dtype="int32"), state


def kernel_bytes(implementation: str, batch: int) -> int:
    """Of the kernel of one token, where it is one."""
    sizes = (batch, H, H, CONFIG.block, CONFIG.window, WIDTH, WIDTH, 1.0, 1.0)
    if implementation == "pallas_gpu":
        return gpu.bytes_moved(gpu.Call(*sizes, jnp.bfloat16, None), CONFIG.block - 1)
    return tpu.bytes_moved(tpu.Call(*sizes, False, None, jnp.bfloat16, False)) if implementation == "pallas_tpu" else 0


def floor_bytes(batch: int) -> int:
    return batch * H * (2 * 4 * WIDTH**2 + 2 * 2 * WIDTH * (CONFIG.window + CONFIG.block))


def ours(each: hlo.Instruction) -> bool:
    return each.opcode == "custom-call" and "/hola_step" in each.attributes


def without(program: hlo.Program, left_out: Callable[[hlo.Instruction], bool]) -> hlo.Program:
    """The program, but for some of its outermost instructions."""
    entry = program.entry
    kept = {name: each for name, each in entry.instructions.items() if each.root or not left_out(each)}
    entry = hlo.Computation(entry.name, kept)
    return hlo.Program({**program.computations, entry.name: entry}, entry)


def row(name: str, chip: Topology, implementation: str, batch: int) -> str:
    """Compiles a token; its line of the table."""
    here = jax.sharding.SingleDeviceSharding(chip.devices[0])
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arrays(batch))

    def token(*given: Any) -> Any:
        *inputs, params, documents, state = given
        options: Any = {"segment_ids": documents, "state": state, "implementation": implementation}
        return hola_memory(*inputs, params, config=CONFIG, **options)

    compiled = jax.jit(token, donate_argnums=len(given) - 1).lower(*given).compile()
    program = hlo.parse(compiled.as_text() or "")
    calls = sum(ours(each) for each in program.entry.instructions.values())
    rest = without(program, ours)
    with_conditionals = cost(rest, chip.chip)
    always = cost(without(rest, lambda each: each.opcode == "conditional"), chip.chip)
    moved, floor = always.traffic + kernel_bytes(implementation, batch), floor_bytes(batch)
    memory: Any = compiled.memory_analysis()
    return (
        f"| {name} | {batch} | {implementation} | {moved / 1e6:,.1f} | {moved / floor:.2f} | {floor / 1e6:,.1f} | "
        f"{(with_conditionals.traffic - always.traffic) / 1e6:,.1f} | {always.kernels + calls:.0f} | "
        f"{memory.temp_size_in_bytes / 2**20:,.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 128], help="B")
    options = parser.parse_args()
    print(f"one token, H={H} K=V={WIDTH} W={CONFIG.window} C={CONFIG.block}, bfloat16; jax {jax.__version__}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for name in options.chips:
        place, kernels = CHIPS[name]
        try:
            chip = topology(place)
        except RunError as error:
            print(f"no {name}: {error}", file=sys.stderr)
            continue
        for batch in options.rows:
            for implementation in ("xla", kernels):
                print(row(name, chip, implementation, batch), flush=True)


if __name__ == "__main__":
    main()
