"""The TPU kernels as compiled for chips that are not there: `make bench-tpu-compile`, or `--help`.

Compiles each kernel, the kernels in pairs and the XLA path with libtpu on a CPU, and prints what the compiled programs move,
compute and hold. Bytes of the kernels' calls are counted from the shapes of operands and results (of the decoding step,
which works in place, as its copies go); those of whole programs as `hola plan` counts them (train/plan/cost.py), loops as
often as they run. FLOPs are matrix products, in the kernels as they declare them. Nothing here is a time of a chip.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from hola_jax.memory import CacheParams, MemoryConfig, hola_memory, init_state
from hola_jax.memory.norms import for_reading
from pallas_kernels.cache import cached_read
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.hola import Learned, hola
from pallas_kernels.step import Memory, step
from train.config import RunError
from train.plan import hlo
from train.plan.cost import cost
from train.plan.topology import Topology, topology

H, K, V = 4, 256, 256
CONFIG = MemoryConfig(window=64, block=256, chunk=64)
SCALE = CONFIG.scale(K)
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Of the state path, per token and head, at a chunk of 64 (docs/performance.md): forward, and with the backward pass.
FLOOR_BYTES, FLOOR_FLOPS = (4104, 9888), (524288, 524288 + 1081344)


def delta_rule_alone(q: Any, k: Any, v: Any, beta: Any, decay: Any, params: CacheParams) -> Any:
    return delta_rule(q, k, v, beta, decay, scale=SCALE, normalise=True).out


def cache_alone(q: Any, k: Any, v: Any, beta: Any, decay: Any, params: CacheParams) -> Any:
    """Scores are made up of the gates: what matters is that they come from memory."""
    options = {"window": CONFIG.window, "block": CONFIG.block}
    return cached_read(q, k, v, (beta * jnp.exp(decay)).swapaxes(1, 2), params.sink_logit, **options)[0]


def two_kernels(q: Any, k: Any, v: Any, beta: Any, decay: Any, params: CacheParams) -> Any:
    """The delta rule's kernel, norms by XLA, the cache's kernel, their sum by XLA."""
    found = delta_rule(q, k, v, beta, decay, scale=SCALE, normalise=True, magnitude="surprise", out_dtype=jnp.float32)
    queries, keys = for_reading(q, k, H, params, CONFIG)
    read, *_ = cached_read(
        queries,
        keys,
        v,
        found.magnitude.swapaxes(1, 2),
        params.sink_logit,
        window=CONFIG.window,
        block=CONFIG.block,
        out_dtype=jnp.float32,
    )
    return (found.out + jax.nn.sigmoid(params.gate_logit)[:, None] * read).astype(v.dtype)


def learned(params: CacheParams) -> Learned:
    gate = jax.nn.sigmoid(params.gate_logit)
    return Learned(params.query_scale * K**-0.5, params.key_scale, params.sink_logit, gate)


def fused(q: Any, k: Any, v: Any, beta: Any, decay: Any, params: CacheParams) -> Any:
    return hola(q, k, v, beta, decay, learned(params), scale=SCALE, window=CONFIG.window, block=CONFIG.block).out


def memory(q: Any, k: Any, v: Any, beta: Any, decay: Any, params: CacheParams) -> Any:
    return hola_memory(q, k, v, beta, decay, params, config=CONFIG, implementation="pallas_tpu")[0]


def xla(q: Any, k: Any, v: Any, beta: Any, decay: Any, params: CacheParams) -> Any:
    return hola_memory(q, k, v, beta, decay, params, config=CONFIG, implementation="xla")[0]


SEQUENCES: dict[str, Callable[..., Any]] = {
    "delta_rule": delta_rule_alone,
    "cache": cache_alone,
    "delta_rule, then cache": two_kernels,
    "hola": fused,
    "hola_memory": memory,
    "the XLA path": xla,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile and what it is held against."""

    name: str
    what: str
    run: Callable[..., Any]
    arrays: tuple[Any, ...]
    floor_bytes: float
    floor_flops: float
    donated: tuple[int, ...] = ()


def sequences(rows: int, tokens: int) -> Iterator[Case]:
    """Forward, and forward with the backward pass, as in the model: projections make the heads side by side."""

    def array(*shape: int, dtype: str = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    wide = [array(rows, tokens, H * width, dtype="bfloat16") for width in (K, K, V)]
    params = CacheParams(array(K), array(K), array(H), array(H), None)
    arrays = (*wide, array(rows, tokens, H), array(rows, tokens, H), params)
    for name, memory in SEQUENCES.items():

        def forward(*arrays: Any, memory: Callable[..., Any] = memory) -> Any:
            heads = [x.reshape(rows, tokens, H, -1) for x in arrays[:3]]
            return memory(*heads, *arrays[3:]).reshape(rows, tokens, H * V)

        def both(d: Any, *arrays: Any, forward: Callable[..., Any] = forward) -> Any:
            out, backward = jax.vjp(forward, *arrays)
            return out, backward(d)

        floors = [[rows * tokens * H * each for each in floor] for floor in (FLOOR_BYTES, FLOOR_FLOPS)]
        yield Case(name, "forward", forward, arrays, floors[0][0], floors[1][0])
        yield Case(name, "and backward", both, (wide[2], *arrays), floors[0][1], floors[1][1])


def decoding(rows: int) -> Iterator[Case]:
    """One token of every row; the memory is given away, as a loop over tokens does."""
    state = jax.eval_shape(lambda: init_state(CONFIG, rows, H, K, V, jnp.bfloat16))
    token = [jax.ShapeDtypeStruct((rows, H, width), "bfloat16") for width in (K, K, V)]
    gates = [jax.ShapeDtypeStruct((rows, H), "float32")] * 2
    params = CacheParams(*(jax.ShapeDtypeStruct((size,), "float32") for size in (K, K, H, H)), None)
    documents = jax.ShapeDtypeStruct((rows,), "int32")
    memory = Memory(*(getattr(state, name) for name in Memory._fields))

    def by_kernel(memory: Memory, token: list[Any], params: CacheParams, documents: Any) -> Any:
        return step(*token, learned(params), memory, documents, scale=SCALE)

    def by_xla(state: Any, token: list[Any], params: CacheParams, documents: Any) -> Any:
        inputs = [x[:, None] for x in token]
        options = {"config": CONFIG, "segment_ids": documents[:, None], "state": state, "implementation": "xla"}
        return hola_memory(*inputs, params, **options)

    visible = 2 * (CONFIG.window + CONFIG.block) * (K + V)
    floor, flops = rows * H * (8 * K * V + visible), rows * H * (6 * K * V + visible)
    arrays = ([*token, *gates], params, documents)
    yield Case("step", "one token", by_kernel, (memory, *arrays), floor, flops, (0,))
    yield Case("the XLA path", "one token", by_xla, (state, *arrays), floor, flops, (0,))


def kernel_calls(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for given in equation.params.values():
            for inner in given if isinstance(given, (tuple, list)) else (given,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from kernel_calls(inner)


def moved(call: Any) -> float:
    """Bytes of operands and results; of a call that works in place, as it declares."""
    if call.params["input_output_aliases"]:
        return float(call.params["cost_estimate"].bytes_accessed)
    return float(sum(x.aval.size * x.aval.dtype.itemsize for x in (*call.invars, *call.outvars)))


def row(case: Case, chip: Topology) -> str:
    """Compiles one program; its line of the table."""
    here = jax.sharding.SingleDeviceSharding(chip.devices[0])
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), case.arrays)
    begin = time.perf_counter()
    traced = jax.jit(case.run, donate_argnums=case.donated).trace(*arrays)
    compiled = traced.lower().compile()
    took = time.perf_counter() - begin
    calls = list(kernel_calls(traced.jaxpr.jaxpr))
    program = cost(hlo.parse(compiled.as_text() or ""), chip.chip)
    kernels = sum(moved(call) for call in calls)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    told = f"{kernels / 1e6:,.1f} | {kernels / case.floor_bytes:.2f}" if calls else "- | -"
    whole = program.traffic / 1e6 if not case.donated or not calls else kernels / 1e6
    return (
        f"| {case.name} | {case.what} | {chip.name.split(':')[0]} | {told} | {case.floor_bytes / 1e6:,.1f} | {whole:,.1f} | "
        f"{program.flops / 1e9:,.2f} | {case.floor_flops / 1e9:,.2f} | {temporary / 2**20:,.1f} | {took:.0f} |"
    )


COLUMNS = ("program", "pass", "chip", "calls MB", "of floor", "floor MB", "program MB", "GFLOP", "floor GFLOP")
COLUMNS += ("temporary MiB", "compiled in s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8, help="B")
    parser.add_argument(
        "--tokens", type=int, default=2048, help="T; 8192 with --rows 2 is the other shape of the figures"
    )
    parser.add_argument("--decode-rows", type=int, default=16, help="B of the decoding step")
    parser.add_argument("--chips", nargs="+", default=list(TOPOLOGIES), choices=list(TOPOLOGIES))
    parser.add_argument("--only", nargs="+", default=[], help="programs by name, such as hola or 'the XLA path'")
    options = parser.parse_args()
    try:
        chips = [topology(TOPOLOGIES[name]) for name in options.chips]
    except RunError as error:
        sys.exit(f"no table: {error}")
    sizes = f"H={H} K={K} V={V} W={CONFIG.window} C={CONFIG.block}, bfloat16"
    print(f"B={options.rows} T={options.tokens} {sizes}; one token: B={options.decode_rows}. jax {jax.__version__}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for case in (*sequences(options.rows, options.tokens), *decoding(options.decode_rows)):
        if not options.only or case.name in options.only:
            for chip in chips:
                print(row(case, chip), flush=True)


if __name__ == "__main__":
    main()
