"""What a run is, as nested frozen dataclasses; how a file and a command line become one; how two of them differ."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from hola_jax import ModelConfig
from train.mesh import MeshConfig
from train.optimizer import OptimizerConfig
from train.whole import write_whole


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what is left."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """every       steps between two checkpoints; the last step is always saved
    keep        so many of the latest stay
    keep_every  and each whose step is a multiple of this; None keeps no others
    keep_best   and so many of the lowest held-out loss
    """

    every: int = 1000
    keep: int = 3
    keep_every: int | None = None
    keep_best: int = 1


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Several processes that train together.

    join          whether there are others; where TPU pods, Slurm and the like tell which, nothing else is needed
    coordinator   address and port of process 0, with `processes` and `process`, the number of this one, where they do not
    heartbeat     seconds after which a silent process is taken for dead
    step_timeout  seconds without a step after which this process ends by itself
    """

    join: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    heartbeat: int = 100
    step_timeout: float = 1800.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """run            folder of checkpoints, metrics and the resolved configuration; a run that is in it goes on
    data           where rows come from (train.data.config)
    steps          of the whole run
    global_batch   rows of a step, over all devices
    row            tokens of a row that are predicted
    seed           of the parameters and of the order of the data
    microbatches   parts of a batch, computed one after the other
    z_loss         weight of the squared log sum of the softmax
    loss_chunk     tokens of one device whose logits exist at a time
    log_every      steps between two lines of metrics
    vitals_every   steps between two looks into the memory; 0 never looks
    depth_every    steps between two looks at the spikes and sinks of all layers; 0 never looks
    eval_every     steps between two held-out losses of `eval_batches` batches; 0 evaluates never
    nan_limit      so many skipped steps stop the run
    writers        besides JSON lines and console: "tensorboard", "wandb"
    """

    run: str
    model: ModelConfig
    data: Any
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    steps: int
    global_batch: int
    row: int
    seed: int = 0
    microbatches: int = 1
    z_loss: float = 0.0
    loss_chunk: int = 2048
    log_every: int = 10
    vitals_every: int = 0
    depth_every: int = 0
    eval_every: int = 0
    eval_batches: int = 8
    nan_limit: int = 10
    writers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = {"steps": 1, "global_batch": 1, "row": 1, "microbatches": 1, "loss_chunk": 1, "log_every": 1}
        least |= {"vitals_every": 0, "depth_every": 0, "eval_every": 0, "eval_batches": 1, "nan_limit": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least {bound}")
        if self.model.mixer == "transformer" and self.row > self.model.max_length:
            raise ValueError(f"row is {self.row} and model.max_length {self.model.max_length}; raise model.max_length")
        for writer in self.writers:
            if writer not in ("tensorboard", "wandb"):
                raise ValueError(f"writers names {writer!r}; it may name tensorboard and wandb")


def as_dict(config: Any) -> Any:
    """Plain values for JSON; what a field alone does not tell, the kind of data, is written as "kind"."""
    if dataclasses.is_dataclass(config):
        fields = {field.name: as_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return fields if type(config).__name__.endswith("Config") else {"kind": type(config).__name__, **fields}
    if isinstance(config, dict):
        return {name: as_dict(value) for name, value in config.items()}
    if isinstance(config, tuple):
        return [as_dict(value) for value in config]
    return config


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"optimizer.peak": 0.0004, ...} of nested values."""
    if not isinstance(values, dict):
        return {prefix: values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}.{name}" if prefix else name)
    return found


def defaults(config: Any) -> dict[str, Any]:
    """As `as_dict` has them: of each setting that has a default, that, whatever `config` has there."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            found[field.name] = as_dict(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = as_dict(field.default_factory())
        elif dataclasses.is_dataclass(getattr(config, field.name)):
            found[field.name] = defaults(getattr(config, field.name))
    return found


def differences(old: dict[str, Any], new: dict[str, Any], usual: dict[str, Any] | None = None) -> list[str]:
    """A line for each value that differs between two results of `as_dict`.

    usual: `defaults`; what `old` does not have, a setting that came later, was at its own"""
    before, after, absent = flat(old), flat(new), "absent"
    was = {**dict.fromkeys(after, absent), **flat(usual or {}), **before}
    return [
        f"{name}: {was[name]!r} -> {after.get(name, absent)!r}"
        for name in sorted(before | after)
        if was[name] != after.get(name, absent)
    ]


def write(config: TrainConfig, folder: Path, command: list[str], versions: dict[str, str]) -> None:
    """The resolved configuration beside the run, with the command that gives it again."""
    values = {"command": " ".join(command), "versions": versions, "config": as_dict(config)}
    write_whole(folder / "config.json", json.dumps(values, indent=2) + "\n")
