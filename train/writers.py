"""Where records go: JSON lines always; TensorBoard and wandb where asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

from train.metrics import Record
from train.whole import write_whole


class Writer(Protocol):
    def write(self, record: Record) -> None:
        """Keeps a record, which has a "step"."""

    def close(self) -> None:
        """Nothing more comes."""


class JsonLines:
    """`metrics.jsonl` of a run: one line to a record, each step once, however often the run was interrupted."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= resumed_at]
        write_whole(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a")

    def write(self, record: Record) -> None:
        finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in record.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _whole_lines(path: Path) -> list[str]:
    """Without the line that a kill cut short."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            json.loads(line)
        except ValueError:
            break
        found.append(line)
    return found


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'writers names "tensorboard"; `pip install tensorboardX` first, or leave it out'
            ) from error
        self.summary: Any = SummaryWriter(str(folder / "tensorboard"))

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if value is not None and name != "step":
                self.summary.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.summary.close()


class Wandb:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError('writers names "wandb"; `pip install wandb` first, or leave it out') from error
        self.run: Any = wandb.init(dir=str(folder), name=folder.name, id=folder.name, resume="allow", config=config)

    def write(self, record: Record) -> None:
        self.run.log({name: x for name, x in record.items() if name != "step"}, step=record["step"])

    def close(self) -> None:
        self.run.finish()


def open_writers(names: tuple[str, ...], folder: Path, config: dict[str, Any], resumed_at: int) -> list[Writer]:
    """JSON lines, and those named."""
    made: list[Writer] = [JsonLines(folder / "metrics.jsonl", resumed_at)]
    if "tensorboard" in names:
        made.append(TensorBoard(folder))
    if "wandb" in names:
        made.append(Wandb(folder, config))
    return made
