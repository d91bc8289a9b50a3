"""What the trainer costs besides its steps: `python benchmarks/trainer.py`, or `--help`.

Host work: a real feed and real records at the shapes of configs/hola_340m.py (256 rows of 2048 tokens), one device, the
step's work replaced by waiting. Saving: real steps of a small model, with and without a save under way.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hola_jax import preset
from train.checkpoint import Checkpoints, shapes
from train.config import CheckpointConfig
from train.data import loader
from train.data.config import LibraryText
from train.feed import feed
from train.layout import Layout
from train.mesh import MeshConfig, make_mesh
from train.metrics import Meter
from train.optimizer import OptimizerConfig
from train.step import Training
from train.writers import JsonLines

ROWS, TOKENS = 256, 2048
STEPS = 5  # to a window with one save in it, or none
FULL_USE = 409e3  # tokens per second of 340M on a fully used H200: 989 TFLOP/s over 2.42 GFLOP a token (`hola plan`)


def layout(name: str, **changes: Any) -> Layout:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Layout(dataclasses.replace(preset(name), **changes), mesh)


def host_work(steps: int, log_every: int) -> None:
    """Milliseconds of one step in which the device has nothing to do."""
    seconds = ROWS * TOKENS / FULL_USE
    rows = loader.open_source(LibraryText(), split="train", vocab_size=32000, row=TOKENS, seed=0)
    batches = feed(loader, rows, layout("hola-340m"), position=0, global_batch=ROWS)
    metrics = {name: jax.numpy.ones(()) for name in ("loss", "gradient_norm", "learning_rate", "tokens", "skipped")}
    spent: dict[str, list[float]] = {"batch": [], "record": []}
    with tempfile.TemporaryDirectory() as folder:
        writer, meter = JsonLines(Path(folder) / "metrics.jsonl", 0), Meter(ROWS * TOKENS, 1.0, jax.devices()[0], 1)
        for step in range(1, steps + 1):
            start = time.perf_counter()
            jax.block_until_ready(next(batches))
            spent["batch"].append(time.perf_counter() - start)
            start = time.perf_counter()
            if step % log_every == 0:
                writer.write(meter.record(step, metrics))
            spent["record"].append(time.perf_counter() - start)
            time.sleep(seconds)
        writer.close()
    total = sum(statistics.mean(times[2:]) for times in spent.values())
    for name, times in spent.items():
        print(f"{name:8} {1e3 * statistics.mean(times[2:]):8.2f} ms a step, at most {1e3 * max(times[2:]):.2f}")
    print(f"host     {1e3 * total:8.2f} ms a step")
    print(f"{total / seconds:.2%} of the {seconds:.2f} s of {ROWS} x {TOKENS} tokens at {FULL_USE:,.0f} tokens/s")


def saving(name: str, rows: int, tokens: int, saves: int) -> None:
    """What a save adds to the steps it runs beside, until it is written."""
    training = Training(layout(name, dtype="float32"), OptimizerConfig(), 1000, 1, 0.0, 2048)
    step = training.lower(rows, tokens).compile()
    state = training.layout.init(0)
    draw = np.random.default_rng(0)
    numbers = draw.integers(1, 1000, size=(rows, tokens + 1)).astype(np.int32)
    ones = np.ones_like(numbers[:, 1:])
    batch = {"tokens": numbers[:, :-1], "targets": numbers[:, 1:], "segment_ids": ones, "mask": ones.astype(np.uint8)}
    batch = {key: jax.device_put(value, training.layout.batch_sharding) for key, value in batch.items()}
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    totals: dict[bool, list[float]] = {False: [], True: []}
    blocked = []
    about = {"position": 0, "seed": 0, "config": {}, "data": {}, "shapes": shapes(training.layout)}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), CheckpointConfig(keep=1), print)
        for window in range(2 * saves + 2):  # the first two warm up
            save, start = window % 2 == 1, time.perf_counter()
            for number in range(STEPS):
                state, metrics = step(state, batch)
                jax.block_until_ready(metrics)
                if save and number == 0:
                    begin = time.perf_counter()
                    checkpoints.save(window, state, {"step": window, **about})
                    blocked.append(time.perf_counter() - begin)
            checkpoints.finish()
            totals[save].append(time.perf_counter() - start)
        checkpoints.close()
    alone = statistics.median(totals[False][1:]) / STEPS
    added = statistics.median(totals[True][1:]) - alone * STEPS
    print(f"{name}: state of {size / 2**20:.0f} MiB; a step of {rows} x {tokens} tokens takes {alone:.2f} s")
    print(
        f"a save holds the loop up for {statistics.median(blocked[1:]):.3f} s and costs {added:.2f} s in all: "
        f"{added / (1000 * alone):.2%} of the steps when each 1000th saves, {added / (100 * alone):.2%} when each 100th does"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps of the host's work")
    parser.add_argument("--log-every", type=int, default=1, help="steps between two records")
    parser.add_argument("--saves", type=int, default=4, help="saves that are timed")
    parser.add_argument("--model", default="hola-46m", help="preset whose state is saved")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, jax {jax.__version__}")
    host_work(options.steps, options.log_every)
    saving(options.model, options.rows, options.tokens, options.saves)


if __name__ == "__main__":
    main()
