"""What rules over depth cost a training step, beside the plain sum: `python benchmarks/depth.py`.

By default the step of a 46M model is compiled for a TPU that is not there (libtpu must be installed), and the compiled
program is read as `hola plan` reads it, loops counted as often as they run: products, HBM traffic, the time of its kernels.
`--seconds` runs a narrower model on this machine's processor instead: the contenders take turns in one process, and
what counts is processor time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import statistics
from collections.abc import Callable
from typing import Any

RULES = ("plain", "block_attention", "attention")
Told = tuple[float, ...]


def compiled_for(options: argparse.Namespace) -> None:
    """A table of the compiled steps."""
    from hola_jax import preset
    from train.config import TrainConfig
    from train.mesh import MeshConfig
    from train.plan.compile import compile_plan
    from train.plan.topology import topology

    where = topology(options.topology)
    first: Told | None = None
    print(f"{options.model}, {options.rows} rows of {options.tokens} tokens on each chip of {where.name}")
    print("| residual | analytic TFLOP | compiled TFLOP | HBM GB | temporary GiB | kernels ms | over plain |")
    print("|---|---|---|---|---|---|---|")
    for rule in RULES:
        model = dataclasses.replace(preset(options.model), residual=rule, remat=options.remat)
        rows = options.rows * len(where.devices)
        config = TrainConfig(run="none", model=model, data=None, steps=1000, global_batch=rows, row=options.tokens)
        plan = compile_plan(config, MeshConfig(), where)
        if plan.report is None or plan.prediction is None or plan.executed is None or plan.traffic is None:
            print(f"| {rule} | does not fit: {plan.refused} |")
            continue
        chips, kernels = len(where.devices), plan.prediction.kernels
        told = (plan.report.analytic_flops / chips, plan.executed, plan.traffic, kernels)
        first = first or told
        over = ", ".join(f"{now / then - 1:+.1%}" for now, then in zip(told, first, strict=True))
        print(
            f"| {rule} | {told[0] / 1e12:.3f} | {told[1] / 1e12:.3f} | {told[2] / 1e9:.2f} | "
            f"{plan.report.temporary_bytes / 2**30:.2f} | {kernels * 1e3:.2f} | {over} |",
            flush=True,
        )


def processor_seconds(run: Callable[[], Any]) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF)
    run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def timed(options: argparse.Namespace) -> None:
    """Medians of processor seconds of loss and gradient."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import jax
    import numpy as np

    from hola_jax import LanguageModel, functional, preset
    from hola_jax.losses import next_token_loss

    tokens = np.random.default_rng(0).integers(0, 256, (1, options.tokens)).astype(np.int32)
    runs: dict[str, Callable[[], Any]] = {}
    for rule in RULES:
        sizes = {"dim": options.dim, "vocab_size": 256, "dtype": "float32"}
        config = dataclasses.replace(preset(options.model), residual=rule, **sizes)  # type: ignore[arg-type]
        forward, params = functional(LanguageModel(config))

        def loss(params: Any, forward: Any = forward) -> Any:
            return next_token_loss(forward(params, tokens)[0][:, :-1], tokens[:, 1:])

        step = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        runs[rule] = lambda step=step, params=params: jax.block_until_ready(step(params))  # type: ignore[misc]
        runs[rule]()
    taken: dict[str, list[float]] = {rule: [] for rule in RULES}
    for _ in range(options.rounds):
        for rule, run in runs.items():
            taken[rule].append(processor_seconds(run))
    plain = statistics.median(taken["plain"])
    print(
        f"{options.model} with dim {options.dim}, {options.tokens} tokens, float32: processor seconds of loss and gradient"
    )
    for rule, seconds in taken.items():
        ratios = [s / p for s, p in zip(seconds, taken["plain"], strict=True)]
        middle = statistics.median(seconds)
        print(f"{rule:16} {middle:.3f} s, {middle / plain - 1:+.1%} (pairs: {min(ratios):.3f} to {max(ratios):.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="hola-46m")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--rows", type=int, default=4, help="on each chip")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--seconds", action="store_true", help="run a narrower model here instead")
    parser.add_argument("--dim", type=int, default=128, help="of --seconds")
    parser.add_argument("--rounds", type=int, default=7, help="of --seconds")
    options = parser.parse_args()
    (timed if options.seconds else compiled_for)(options)


if __name__ == "__main__":
    main()
