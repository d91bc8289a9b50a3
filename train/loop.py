"""The training loop: what `hola train` runs, from a configuration to the last checkpoint."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import stages

import hola_jax
from hola_jax import diagnostics
from train import cluster, forward
from train import config as configuration
from train.checkpoint import Checkpoints, check_resumable, shapes
from train.config import RunError, TrainConfig
from train.feed import Data, feed
from train.layout import Layout, State
from train.mesh import check_batch, make_mesh
from train.metrics import Meter, Record
from train.progress import Progress
from train.report import Report, report
from train.step import Training
from train.whole import write_whole
from train.writers import open_writers

SIGNS: dict[str, forward.Signs] = {"vitals": diagnostics.vital_signs, "depth": diagnostics.depth_signs}


class Run:
    """A run in its folder: made ready by `__init__`, run by `train`."""

    def __init__(self, config: TrainConfig, data: Data, command: list[str]) -> None:
        self.config, self.data = config, data
        self.main = jax.process_index() == 0
        self.folder = Path(config.run)
        self.training = training(config)
        self.identity = data.identity(config.data)
        self.rows = self._open("train")
        self.held_out = self._open("held_out") if config.eval_every else None
        self.checkpoints = Checkpoints(self.folder, config.checkpoint, self.say)
        self.state, self.start = self._resume()
        if self.main:
            configuration.write(
                config, self.folder, command, {"jax": jax.__version__, "hola_jax": hola_jax.__version__}
            )
        self.step, self.report = compiled_step(config, self.training)
        self.evaluation: stages.Compiled | None = None
        self.lookers: dict[str, Callable[..., dict[str, Any]]] = {}
        self._say_report()
        self.baseline = int(self.state["skipped"])
        self.good: int | None = None  # the last checkpoint before the first step skipped by this process

    def _open(self, split: str) -> Any:
        config = self.config
        return self.data.open_source(
            config.data, split=split, vocab_size=config.model.vocab_size, row=config.row, seed=config.seed
        )

    def say(self, line: str) -> None:
        """A line on the console, once for all processes."""
        if self.main:
            print(line, file=sys.stderr, flush=True)

    def _say_report(self) -> None:
        for line in self.report.lines():
            self.say(line)
        if self.main:
            write_whole(self.folder / "report.json", json.dumps(dataclasses.asdict(self.report), indent=2) + "\n")

    def about(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself besides the state."""
        return {
            "step": step,
            "position": step * self.config.global_batch,
            "seed": self.config.seed,
            "config": configuration.as_dict(self.config),
            "data": self.identity,
            "shapes": shapes(self.training.layout),
        }

    def _resume(self) -> tuple[State, int]:
        now, usual = self.about(0), configuration.defaults(self.config)
        check = partial(check_resumable, now=now, usual=usual, say=self.say)
        found = self.checkpoints.restore(self.training.layout, check)
        if found is None:
            self.say(f"starting in {self.folder}")
            return self.training.layout.init(self.config.seed), 0
        state, about = found
        if about["position"] != about["step"] * self.config.global_batch:
            raise RunError(
                f"the checkpoint of step {about['step']} stands at row {about['position']}, which steps of "
                f"global_batch={self.config.global_batch} rows do not reach; go on with the global_batch it was made with"
            )
        self.say(f"resuming {self.folder} from step {about['step']}, row {about['position']:,} of the data")
        return state, about["step"]

    def train(self) -> int:
        """The exit code: 0 when the last step is done, 75 when stopped by SIGTERM; either way all is saved."""
        config = self.config
        if self.start >= config.steps:
            self.say(f"the run has its {config.steps} steps already; --steps asks for more")
            return 0
        batches = feed(
            self.data,
            self.rows,
            self.training.layout,
            position=self.start * config.global_batch,
            global_batch=config.global_batch,
        )
        log = Log(self)
        stop, watchdog = cluster.StopRequest(), cluster.Watchdog(config.cluster.step_timeout)
        for step in range(self.start + 1, config.steps + 1):
            with log.meter.clock.besides():
                batch = next(batches)
            self.state, metrics = self.step(self.state, batch)
            log.take(step, metrics)
            watchdog.beat()
            last, stopping = step == config.steps, stop.reached(step)
            for name, every in (("vitals", config.vitals_every), ("depth", config.depth_every)):
                if every and step % every == 0:
                    self.look_inside(log, step, name)
            loss = self.evaluate(log, step) if config.eval_every and (last or step % config.eval_every == 0) else None
            if last or stopping or step % config.checkpoint.every == 0:
                self.save(log, step, loss)
            if stopping and not last:
                self.checkpoints.close()
                log.close()
                watchdog.rest()
                self.say(f"stopped by SIGTERM at step {step}, saved; the same command goes on from there")
                return cluster.PREEMPTED
        saved = self.checkpoints.finish()
        self.checkpoints.close()
        log.close()
        watchdog.rest()
        if not saved:
            raise RunError(f"the run is done, but its last checkpoint is not written: {self.checkpoints.failed}")
        return 0

    def save(self, log: Log, step: int, loss: float | None) -> None:
        """Begins to save; the records up to this step are written first."""
        log.flush()
        with log.meter.clock.besides():
            self.checkpoints.save(step, self.state, self.about(step), loss)
        if log.skipped == self.baseline:
            self.good = step

    def evaluate(self, log: Log, step: int) -> float:
        """The held-out loss, also recorded."""
        log.flush()
        config = self.config
        with log.meter.clock.besides():
            if self.evaluation is None:
                self.evaluation = self.training.lower_evaluation(config.global_batch, config.row).compile()
            batches = feed(self.data, self.held_out, self.training.layout, position=0, global_batch=config.global_batch)
            total = tokens = 0.0
            for _, batch in zip(range(config.eval_batches), batches, strict=False):
                sums = self.evaluation(self.state["params"], batch)
                total, tokens = total + float(sums.nll), tokens + float(sums.tokens)
            if not tokens:
                raise RunError(
                    f"the held-out rows do not fill one batch of {config.global_batch}; hold out more or set --eval-every=0"
                )
            loss = total / tokens
            log.write({"step": step, "held_out_loss": loss, "held_out_perplexity": math.exp(min(loss, 700.0))})
        return loss

    def look_inside(self, log: Log, step: int, name: str) -> None:
        """Records signs of the memory ("vitals") or of all layers ("depth"), on the first two rows of the data."""
        if name == "vitals" and self.config.model.mixer != "hola":
            return
        log.flush()
        with log.meter.clock.besides():
            tokens = np.stack([self.rows[index]["tokens"] for index in range(2)])
            if name not in self.lookers:
                self.lookers[name] = forward.looker(self.training.layout, SIGNS[name])
            found = jax.device_get(self.lookers[name](self.state["params"], tokens))
            log.write({"step": step, **{sign: float(x) for sign, x in found.items()}})

    def check_skipped(self, skipped: int, step: int) -> None:
        """Raises when too many steps were not finite."""
        if skipped - self.baseline < self.config.nan_limit:
            return
        self.checkpoints.finish()
        good = (
            f"the last good checkpoint is that of step {self.good or self.start}"
            if self.good or self.start
            else ("there is no checkpoint from before")
        )
        raise RunError(
            f"{skipped - self.baseline} steps up to {step} had a loss or gradient that is not finite (nan_limit is "
            f"{self.config.nan_limit}) and were skipped; {good}, in {self.checkpoints.folder}"
        )


class Log:
    """Records on their way out. A step's metrics are fetched one step later, while the device is busy with the next."""

    def __init__(self, run: Run) -> None:
        self.run, self.skipped = run, run.baseline
        config, devices = run.config, run.training.layout.mesh.devices
        tokens = config.global_batch * config.row
        self.meter = Meter(tokens, run.report.analytic_flops, devices.flat[0], devices.size)
        plain = configuration.as_dict(config)
        self.writers = open_writers(config.writers, run.folder, plain, run.start) if run.main else []
        self.progress = Progress(run.folder.name, config.steps, first=run.start)
        self.pending: tuple[int, dict[str, Any]] | None = None
        self.meter.begin(run.start)

    def take(self, step: int, metrics: dict[str, Any]) -> None:
        """Metrics of a step just begun."""
        self.flush()
        if step % self.run.config.log_every == 0 or step in (self.run.start + 1, self.run.config.steps):
            self.pending = (step, metrics)

    def flush(self) -> None:
        """Writes what is pending; waits for its step."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        record = self.meter.record(step, metrics)
        with self.meter.clock.besides():
            self.skipped = int(metrics["skipped"])
            self.write(record)
            if self.run.main:
                self.progress.note = note(record)
                self.progress.show(step, last=step == self.run.config.steps)
        self.run.check_skipped(self.skipped, step)

    def write(self, record: Record) -> None:
        for writer in self.writers:
            writer.write(record)

    def close(self) -> None:
        self.flush()
        for writer in self.writers:
            writer.close()


def note(record: Record) -> str:
    """What stands behind the progress bar."""
    mfu = "" if record["mfu"] is None else f", MFU {record['mfu']:.1%}"
    skipped = f", {record['skipped']} skipped" if record["skipped"] else ""
    return f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s{mfu}{skipped}"


def training(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> Training:
    """What the configuration's step is made of; wrong combinations are named before anything is compiled."""
    mesh = make_mesh(config.mesh, devices)
    check_batch(mesh, config.global_batch, config.microbatches, config.row, config.model.memory.block)
    return Training(
        Layout(config.model, mesh),
        config.optimizer,
        config.steps,
        config.microbatches,
        config.z_loss,
        config.loss_chunk,
    )


def compiled_step(config: TrainConfig, training: Training) -> tuple[stages.Compiled, Report]:
    """The step, and what it costs."""
    start = time.perf_counter()
    compiled = training.lower(config.global_batch, config.row).compile()
    seconds = time.perf_counter() - start
    return compiled, report(compiled, training.layout, config.global_batch, config.row, seconds)


def run(config: TrainConfig, data: Data | None = None, command: list[str] | None = None) -> int:
    """Trains, from the run folder's last checkpoint where there is one; gives the exit code."""
    cluster.join(config.cluster)
    loader: Any = importlib.import_module("train.data.loader") if data is None else data
    if jax.process_count() == 1:
        return Run(config, loader, command or sys.argv).train()
    try:
        return Run(config, loader, command or sys.argv).train()
    except jax.errors.JaxRuntimeError as error:
        cluster.leave(
            f"a step failed, most likely because another process is gone ({str(error).splitlines()[0][:200]}); start all "
            "again, and the run goes on from its last checkpoint"
        )
        raise
