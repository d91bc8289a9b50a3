"""`python -m train.study.cell FILE ROW SEED RESULTS RUNS`: one run of a study, in a process of its own.

It goes on from its last checkpoint where it was stopped. Its result is one small JSON file, written whole or not at all.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

import hola_jax
from hola_jax.config import parameter_count
from train import cli
from train.loop import run
from train.study.config import Cell, Study, load
from train.study.measure import measured
from train.study.results import write_result
from train.trained import model_of
from train.weights import look


def train_and_measure(study: Study, cell: Cell, folder: Path) -> dict[str, Any]:
    """The cell's result; exits as `hola train` does where the run was stopped."""
    config = study.config(cell, str(folder))
    begun = time.monotonic()
    code = run(config, command=["hola", "train", str(folder)])
    if code:
        sys.exit(code)
    trained = time.monotonic() - begun
    model = model_of(look(folder))
    found = {name: measured(model, measure, config.row)._asdict() for name, measure in study.measures.items()}
    return {
        "row": cell.row,
        "seed": cell.seed,
        "settings": study.settings(cell),
        "parameters": parameter_count(config.model)["total"],
        "measures": found,
        "curve": curve(folder / "metrics.jsonl", config.global_batch * config.row),
        "seconds": round(trained, 1),  # since the last start
        "versions": {"jax": jax.__version__, "hola_jax": hola_jax.__version__},
        "device": jax.devices()[0].device_kind,
    }


def curve(metrics: Path, tokens: int) -> list[tuple[int, float]]:
    """(tokens seen, held-out nats) along the run, of so many tokens a step."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(each["step"] * tokens, round(each["held_out_loss"], 5)) for each in records if "held_out_loss" in each]


def main(arguments: list[str]) -> None:
    file, row, seed, results, runs = arguments
    cell = Cell(row, int(seed))
    write_result(Path(results), cell, train_and_measure(load(file), cell, Path(runs) / cell.name))


if __name__ == "__main__":
    cli.said_in_a_line(lambda: main(sys.argv[1:]))
