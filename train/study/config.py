"""What a study is, as plain values: `study = Study(...)` in a Python file, such as those in configs/study/."""

from __future__ import annotations

import dataclasses
import re
import runpy
from pathlib import Path
from typing import Any, Literal

from train.config import TrainConfig, as_dict
from train.data.config import Facts, Mixture, Source
from train.overrides import override

NAME = re.compile(r"[\w+.-]+")
Shows = Literal["accuracy", "perplexity", "spike", "sink"]
PLOTTED = {"accuracy", "perplexity"}  # what every model has, and may be drawn against the length of rows


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a trained model is asked: held-out rows of a source, and what of the answer a table shows.

    shows   "accuracy" or "perplexity" of the tokens that count; or, over depth (docs/depth.md), "spike", the largest
            activation in medians of its depth, or "sink", the share of heads whose reads rest on the first token
    rows    so many of the source's first rows; 0 takes all, of a source that ends
    length  tokens of a row; None is as many as in training
    """

    source: Source
    shows: Shows = "accuracy"
    rows: int = 256
    length: int | None = None

    def __post_init__(self) -> None:
        if self.rows < 0 or (self.rows == 0 and isinstance(self.source, Facts | Mixture)):
            raise ValueError(f"Measure.rows is {self.rows}; it must be at least 1, or 0 for all rows of a text")
        if self.length is not None and self.length < 2:
            raise ValueError(f"Measure.length is {self.length}; it must be at least 2")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run of a study: a row of its table, with one seed."""

    row: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row}.{self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """The rows of a table, each trained with every seed.

    title      of the table; `question` is what it answers, in a sentence or two
    base       the run that all rows share; its folder and seed do not matter
    rows       name: the settings that make the row, by the names of the command line ({"model.mixer": "gated_deltanet"});
               the others are compared with the first
    measures   name of a column: what stands in it
    across     names of measures that differ in the length of their rows, to be plotted against it
    """

    title: str
    question: str
    base: TrainConfig
    rows: dict[str, dict[str, Any]]
    measures: dict[str, Measure]
    across: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        for what, found in (("rows", self.rows), ("measures", self.measures), ("seeds", self.seeds)):
            if not found:
                raise ValueError(f"the study has no {what}; it needs at least one")
        for row in self.rows:
            if not NAME.fullmatch(row):
                raise ValueError(f"the row {row!r} names files; use letters, digits and + - . _ alone")
        for name in self.across:
            if name not in self.measures:
                raise ValueError(f"Study.across names {name!r}; the study measures {', '.join(self.measures)}")
        shown = {self.measures[name].shows for name in self.across}
        if len(shown) > 1 or not shown <= PLOTTED:
            raise ValueError(
                f"the measures of Study.across show {', '.join(sorted(shown))}; all must show the same, "
                f"{' or '.join(sorted(PLOTTED))}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"the seeds {self.seeds} name one twice")
        for cell in self.cells():
            self.config(cell, "")  # a setting that does not exist is an error now

    def cells(self) -> list[Cell]:
        """All runs; all rows with the first seed come before any with the second."""
        return [Cell(row, seed) for seed in self.seeds for row in self.rows]

    def config(self, cell: Cell, folder: str) -> TrainConfig:
        """What is trained."""
        config = dataclasses.replace(self.base, run=folder, seed=cell.seed)
        for name, value in self.rows[cell.row].items():
            try:
                config = override(config, name, str(value))
            except (ValueError, TypeError) as error:
                raise ValueError(f"row {cell.row}: {error}") from error
        return config

    def settings(self, cell: Cell) -> dict[str, Any]:
        """All that a result depends on, as plain values."""
        return as_dict({"train": self.config(cell, ""), "measures": self.measures})


def load(path: str | Path) -> Study:
    """The `study` of a Python file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no study file {path}; configs/study/ has some")
    study = runpy.run_path(str(path)).get("study")
    if not isinstance(study, Study):
        raise ValueError(f"{path} defines no `study = Study(...)`; see configs/study/reads.py")
    return study
