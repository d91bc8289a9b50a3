"""Training steps on the accelerator at hand: `python benchmarks/gpu.py`, or `--help`.

Each model takes real steps (train.step: forward, backward, AdamW) on made-up tokens on one device, and the table has its
tokens per second and MFU. Wants jax, flax, optax, numpy and jaxtyping alone. `--profile DIR` leaves a trace of three steps
of the first model, `--preset tiny --rows 8 --tokens 256` shows on a CPU what the table looks like.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from hola_jax import preset
from train.layout import Layout
from train.mesh import MeshConfig, make_mesh
from train.metrics import peak_flops
from train.optimizer import OptimizerConfig
from train.report import report
from train.step import Training


def made_batch(layout: Layout, rows: int, tokens: int) -> dict[str, jax.Array]:
    """Tokens at random, one document to a row."""
    numbers = np.random.default_rng(0).integers(layout.model.vocab_size, size=(rows, tokens + 1)).astype(np.int32)
    ones = np.ones((rows, tokens), np.int32)
    batch = {"tokens": numbers[:, :-1], "targets": numbers[:, 1:], "segment_ids": ones, "mask": ones.astype(bool)}
    return {name: jax.device_put(x, layout.batch_sharding) for name, x in batch.items()}


def measure(name: str, options: argparse.Namespace, profile: str | None) -> None:
    """Prints the row of one model."""
    device = jax.devices()[0]
    layout = Layout(
        dataclasses.replace(preset(name), remat=options.remat, implementation=options.implementation),
        make_mesh(MeshConfig(), [device]),
    )
    training = Training(layout, OptimizerConfig(), 1000, options.microbatches, 0.0, options.loss_chunk)
    start = time.perf_counter()
    step = training.lower(options.rows, options.tokens).compile()
    cost = report(step, layout, options.rows, options.tokens, time.perf_counter() - start)
    state, batch = layout.init(0), made_batch(layout, options.rows, options.tokens)
    times: list[float] = []
    metrics: Any = None
    for _ in range(options.steps + 2):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    peak = peak_flops(device.device_kind)
    mfu = "unknown" if peak is None else f"{cost.analytic_flops / seconds / peak:.1%}"
    rate = options.rows * options.tokens / seconds
    print(
        f"{name:18} {1e3 * seconds:10.1f} ms {rate:12,.0f} tokens/s  MFU {mfu:8} {cost.peak_bytes / 2**30:7.2f} GiB  "
        f"compiled in {cost.compile_seconds:.0f} s, {cost.implementation}, loss {float(metrics['loss']):.3f}",
        flush=True,
    )
    if profile:
        with jax.profiler.trace(profile):
            for _ in range(3):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="340m", help="scale of the models")
    parser.add_argument("--models", default="hola,gdn,transformer", help="which, by the presets' first part")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--remat", default="full", help="none, dots or full")
    parser.add_argument("--implementation", default=None, help="of the memory; the default chooses")
    parser.add_argument("--loss-chunk", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", default=None, help="folder for a trace")
    options = parser.parse_args(arguments)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {options.rows} rows of {options.tokens} tokens a step"
    )
    for number, model in enumerate(options.models.split(",")):
        measure(f"{model}-{options.preset}", options, options.profile if number == 0 else None)


if __name__ == "__main__":
    main()
