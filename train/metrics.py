"""What is measured of a run while it runs: one record every few steps."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax

from train.plan.chips import CHIPS

Record = dict[str, float | int | None]

# Peak operations per second of one device in bfloat16, without sparsity, by a part of its `device_kind` (data sheets).
PEAK = {
    "h200": CHIPS["h200"].flops,
    "h100": CHIPS["h100"].flops,
    "a100": 312e12,
    "b200": 2250e12,
    "tpu v4": CHIPS["v4"].flops,
    "tpu v5p": CHIPS["v5p"].flops,
    "tpu v5 lite": CHIPS["v5e"].flops,
    "tpu v5e": CHIPS["v5e"].flops,
    "tpu v5": CHIPS["v5p"].flops,
    "tpu v6": CHIPS["v6e"].flops,
}


def peak_flops(kind: str) -> float | None:
    """Of one device of this kind in bfloat16; None where it is not known, as of a CPU."""
    return next((flops for name, flops in PEAK.items() if name in kind.lower()), None)


class Clock:
    """Where the wall time goes between two records: in steps, or in what the loop does besides."""

    def __init__(self) -> None:
        self.start, self.aside = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def besides(self) -> Iterator[None]:
        """Time inside is not spent stepping."""
        begin = time.perf_counter()
        yield
        self.aside += time.perf_counter() - begin

    def lap(self) -> tuple[float, float]:
        """(seconds since the last lap, share of them spent stepping)."""
        now = time.perf_counter()
        spent, aside = now - self.start, self.aside
        self.start, self.aside = now, 0.0
        return spent, max(0.0, 1.0 - aside / spent) if spent else 1.0


class Meter:
    """Makes records of a step's metrics and of the time since the last."""

    def __init__(self, tokens_per_step: int, flops_per_step: float, device: jax.Device, devices: int) -> None:
        self.tokens, self.flops = tokens_per_step, flops_per_step
        peak = peak_flops(device.device_kind)
        self.peak = None if peak is None else peak * devices
        self.clock, self.last = Clock(), 0

    def begin(self, step: int) -> None:
        """The time before this step is not counted."""
        self.last = step
        self.clock.lap()

    def record(self, step: int, metrics: dict[str, Any]) -> Record:
        """Of step number `step`; waits until it is done."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        seconds, stepping = self.clock.lap()
        steps, self.last = step - self.last, step
        rate = steps / seconds if seconds else 0.0
        return {
            "step": step,
            "loss": values["loss"],
            "perplexity": math.exp(min(values["loss"], 700.0)) if math.isfinite(values["loss"]) else math.nan,
            "gradient_norm": values["gradient_norm"],
            "learning_rate": values["learning_rate"],
            "tokens": int(values["tokens"]),
            "skipped": int(values["skipped"]),
            "tokens_per_second": rate * self.tokens,
            "mfu": None if self.peak is None else rate * self.flops / self.peak,
            "stepping": stepping,
        }
