"""The memory on one CPU core, its peers beside it in the same run: `make bench-cpu`, or `python benchmarks/cpu.py --help`.

Every cell is B = 1, H = 4, float32, chunk 64, one pinned core. The contenders of a cell take turns, so that a machine
whose speed drifts slows all of them; times are medians, and what to quote is the ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

CELLS = [(2048, 64), (2048, 128), (8192, 64), (8192, 128)]
HEADS, CHUNK, WINDOW, BLOCK = 4, 64, 64, 256
Arrays = list[np.ndarray]
Run = Callable[[], Any]


def pin_to_one_core() -> None:
    """Before jax and torch start their thread pools."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"


def inputs(tokens: int, dim: int, kind: str = "ordinary") -> Arrays:
    """q, k, v, beta, log decay."""
    draw = np.random.default_rng(0)
    q, k, v = (draw.normal(size=(1, tokens, HEADS, dim)).astype(np.float32) for _ in range(3))
    beta = draw.uniform(size=(1, tokens, HEADS)).astype(np.float32)
    decay = -draw.exponential(0.1, size=(1, tokens, HEADS)).astype(np.float32)
    if kind == "parallel keys":
        k = (np.ones_like(k) + 0.05 * k).astype(np.float32)
        beta = np.full_like(beta, 0.98)
    if kind == "closed gates":
        decay = np.where(draw.uniform(size=decay.shape) < 0.5, np.float32(-30.0), decay)
    return [q, k, v, beta, decay]


def jax_contender(function: Callable[..., Any], arrays: Arrays, backward: bool) -> tuple[Run, float]:
    """(a call that waits for its result, seconds to compile it)."""
    import jax
    import jax.numpy as jnp

    if backward:
        weights = jnp.asarray(np.random.default_rng(1).normal(size=arrays[2].shape), jnp.float32)
        call = jax.jit(jax.grad(lambda *a: jnp.sum(function(*a) * weights), argnums=(0, 1, 2, 3, 4)))
    else:
        call = jax.jit(function)
    placed = [jnp.asarray(x) for x in arrays]
    start = time.perf_counter()
    compiled = call.lower(*placed).compile()
    seconds = time.perf_counter() - start
    return lambda: jax.block_until_ready(compiled(*placed)), seconds


def our_state(q: Any, k: Any, v: Any, beta: Any, decay: Any, scan: str = "auto") -> Any:
    from hola_jax.memory.delta_rule import delta_rule
    from hola_jax.memory.norms import unit_l2

    scale = q.shape[-1] ** -0.5
    return delta_rule(unit_l2(q), unit_l2(k), v, beta, decay, scale=scale, chunk=CHUNK, scan=scan).out  # type: ignore[arg-type]


def our_memory(q: Any, k: Any, v: Any, beta: Any, decay: Any) -> Any:
    import jax.numpy as jnp

    from hola_jax.memory import CacheParams, MemoryConfig, hola_memory

    params = CacheParams(jnp.ones(q.shape[-1]), jnp.ones(q.shape[-1]), jnp.zeros(HEADS), jnp.full(HEADS, -4.0))
    config = MemoryConfig(window=WINDOW, block=BLOCK, chunk=CHUNK)
    return hola_memory(q, k, v, beta, decay, params, config=config)[0]


def ejkernel_peer(arrays: Arrays, backward: bool) -> tuple[Run, float]:
    from ejkernel.kernels._xla.gated_delta_rule import gated_delta_rule

    peer = getattr(gated_delta_rule, "__wrapped__", gated_delta_rule)
    return jax_contender(lambda *a: peer(*a, chunk_size=CHUNK)[0], arrays, backward)


def torch_peer(arrays: Arrays, backward: bool) -> tuple[Run, float]:
    import torch
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    torch.set_num_threads(1)
    q, k, v, beta, decay = (torch.tensor(x, requires_grad=backward) for x in arrays)
    weights = torch.tensor(np.random.default_rng(1).normal(size=arrays[2].shape).astype(np.float32))

    def run() -> None:
        out = torch_chunk_gated_delta_rule(q, k, v, g=decay, beta=beta, chunk_size=CHUNK, use_qk_l2norm_in_kernel=True)[
            0
        ]
        if backward:
            torch.autograd.grad((out * weights).sum(), (q, k, v, beta, decay))

    return run, 0.0


CONTENDERS: dict[str, Callable[[Arrays, bool], tuple[Run, float]]] = {
    "state": lambda arrays, backward: jax_contender(our_state, arrays, backward),
    "memory": lambda arrays, backward: jax_contender(our_memory, arrays, backward),
    "ejkernel": ejkernel_peer,
    "torch": torch_peer,
}
SCANS: dict[str, Callable[[Arrays, bool], tuple[Run, float]]] = {
    scan: lambda arrays, backward, scan=scan: jax_contender(  # type: ignore[misc]
        lambda *a: our_state(*a, scan=scan), arrays, backward
    )
    for scan in ("sequential", "associative")
}


def take_turns(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, called in turn for about `seconds` in all, three rounds at least."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def speed(contenders: dict[str, Callable[[Arrays, bool], tuple[Run, float]]], seconds: float) -> None:
    """A row per cell and direction: milliseconds, and ratios to the best JAX peer and to our own state path."""
    absent: dict[str, str] = {}
    print(f"{'T':>5} {'K=V':>4} {'pass':>9} " + " ".join(f"{n:>12}" for n in contenders) + "   ratios")
    for tokens, dim in CELLS:
        arrays = inputs(tokens, dim)
        for backward in (False, True):
            runs, compile_seconds = {}, {}
            for name, make in contenders.items():
                try:
                    runs[name], compile_seconds[name] = make(arrays, backward)
                except ImportError as error:
                    absent[name] = str(error)
            times = take_turns(runs, seconds)
            cells = " ".join(f"{times[n]:9.1f} ms" if n in times else f"{'absent':>12}" for n in contenders)
            ratios = [
                f"{a}/{b} {times[a] / times[b]:.2f}"
                for a, b in (
                    ("state", "ejkernel"),
                    ("state", "torch"),
                    ("memory", "state"),
                    ("associative", "sequential"),
                )
                if a in times and b in times
            ]
            own = next(iter(contenders))
            ratios.append(f"compile {compile_seconds[own]:.1f} s")
            print(
                f"{tokens:5} {dim:4} {'fwd+bwd' if backward else 'forward':>9} {cells}   {'  '.join(ratios)}",
                flush=True,
            )
    for name, why in absent.items():
        print(f"absent: {name} ({why}); the README says how to add it")


def exact(arrays: Arrays) -> np.ndarray:
    """The recurrence token by token in float64."""
    q, k, v, beta, decay = (x.astype(np.float64)[0] for x in arrays)
    q, k = (x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6) for x in (q, k))
    state = np.zeros((HEADS, k.shape[-1], v.shape[-1]))
    out = np.empty_like(v)
    for t in range(len(q)):
        state *= np.exp(decay[t])[:, None, None]
        error = v[t] - np.einsum("hk,hkv->hv", k[t], state)
        state += (beta[t][:, None] * k[t])[..., None] * error[:, None]
        out[t] = np.einsum("hk,hkv->hv", q[t], state) * k.shape[-1] ** -0.5
    return out


def errors() -> None:
    """|out - exact| / |exact| of each implementation, on inputs that are easy and hard."""
    for kind in ("ordinary", "parallel keys", "closed gates"):
        for dim in (64, 128):
            arrays = inputs(2048, dim, kind)
            wanted, found = exact(arrays), {}
            for name in ("state", "ejkernel"):
                try:
                    got = np.asarray(CONTENDERS[name](arrays, False)[0](), np.float64)[0]
                except ImportError:
                    continue
                found[name] = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
            print(f"{kind:>14} K=V={dim:<4}" + "  ".join(f"{n} {e:.1e}" for n, e in found.items()), flush=True)


def train_step(tokens: int, rounds: int) -> None:
    """A 46M training step (loss, gradient, AdamW) of HOLA over one of Gated DeltaNet, B = 1, float32."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import optax

    import hola_jax

    runs: dict[str, Run] = {}
    targets = jnp.asarray(np.random.default_rng(0).integers(0, 32000, (1, tokens)))
    for name in ("hola-46m", "gdn-46m"):
        config = dataclasses.replace(hola_jax.preset(name), dtype="float32")
        forward, params = hola_jax.functional(hola_jax.LanguageModel(config, seed=0))
        optimizer = optax.adamw(4e-4)

        def step(params: Any, moments: Any, forward: Any = forward, optimizer: Any = optimizer) -> Any:
            def loss(params: Any) -> Any:
                logits = forward(params, targets)[0]
                return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

            updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
            return optax.apply_updates(params, updates), moments

        start = params, optimizer.init(params)
        compiled = jax.jit(step).lower(*start).compile()
        runs[name] = lambda compiled=compiled, start=start: jax.block_until_ready(compiled(*start))  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    hola, gdn = (statistics.median(seconds[name]) for name in runs)
    print(f"46M step, T={tokens}: HOLA {hola:.2f} s, Gated DeltaNet {gdn:.2f} s, ratio {hola / gdn:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each row of the table")
    parser.add_argument("--cells", type=int, default=len(CELLS), help="only the first cells")
    parser.add_argument("--scan", action="store_true", help="compare the two ways to join chunks instead")
    parser.add_argument("--errors", action="store_true", help="errors against float64 instead")
    parser.add_argument("--step", action="store_true", help="a whole 46M training step instead")
    parser.add_argument("--tokens", type=int, default=2048, help="of --step")
    options = parser.parse_args()
    pin_to_one_core()
    del CELLS[options.cells :]
    if options.errors:
        errors()
    elif options.step:
        train_step(options.tokens, rounds=5)
    else:
        speed(SCANS if options.scan else CONTENDERS, options.seconds)


if __name__ == "__main__":
    main()
