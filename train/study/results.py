"""The small files that a study's runs leave, and the table that they make."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from train.config import TrainConfig, as_dict, differences
from train.overrides import from_dict
from train.study.config import Cell, Study
from train.whole import write_whole

Result = dict[str, Any]
Results = dict[Cell, Result]


def write_result(folder: Path, cell: Cell, result: Result) -> None:
    write_whole(folder / f"{cell.name}.json", json.dumps(result, indent=1) + "\n")


def read_results(study: Study, folder: Path) -> Results:
    """Of the cells that are done. One that was made with other settings is an error: it would not belong to the table."""
    found = {}
    for cell in study.cells():
        path = folder / f"{cell.name}.json"
        if not path.is_file():
            continue
        try:
            result = json.loads(path.read_text())
            # A setting that came later has its default, which does what was done then.
            made = result["settings"] | {"train": as_dict(from_dict(TrainConfig, result["settings"]["train"]))}
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path} is no result of a study ({error!r}); delete it, and the run is made again"
            ) from error
        # Through JSON, where a tuple is a list.
        changed = differences(*(json.loads(json.dumps(each)) for each in (made, study.settings(cell))))
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(
                f"{path} was made with other settings ({'; '.join(changed[:3])}{more}); delete it, and the run is made again"
            )
        found[cell] = result
    return found


def value(study: Study, measure: str, result: Result) -> float:
    """What the table shows of a measure."""
    numbers = result["measures"][measure]
    return math.exp(numbers["nats"]) if study.measures[measure].shows == "perplexity" else float(numbers["accuracy"])


def better(study: Study, measure: str, one: float, other: float) -> bool:
    return one < other if study.measures[measure].shows == "perplexity" else one > other


def table(study: Study, results: Results) -> list[str]:
    """Markdown: means over the seeds with their standard deviation, and on how many seeds a row beats the first row."""
    first = next(iter(study.rows))
    lines = ["| " + " | ".join(["", *study.measures, "runs"]) + " |", "|---" * (len(study.measures) + 2) + "|"]
    for row in study.rows:
        mine = {cell.seed: result for cell, result in results.items() if cell.row == row}
        theirs = {cell.seed: result for cell, result in results.items() if cell.row == first}
        entries = [row]
        for measure in study.measures:
            values = {seed: value(study, measure, result) for seed, result in mine.items()}
            if not values:
                entries.append("")
                continue
            digits = ".2f" if study.measures[measure].shows == "perplexity" else ".3f"
            text = f"{statistics.mean(values.values()):{digits}}"
            if len(values) > 1:
                text += f" ± {statistics.stdev(values.values()):{digits}}"
            both = values.keys() & theirs.keys()
            if row != first and both:
                wins = sum(better(study, measure, values[s], value(study, measure, theirs[s])) for s in both)
                text += f" ({wins}/{len(both)})"
            entries.append(text)
        lines.append("| " + " | ".join([*entries, str(len(mine))]) + " |")
    return lines


def curves(study: Study, results: Results) -> dict[str, list[list[tuple[float, float]]]]:
    """{row: the curve of each seed}: tokens seen and held-out nats along the runs."""
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for cell, result in results.items():
        if result["curve"]:
            found.setdefault(cell.row, []).append([(x, y) for x, y in result["curve"]])
    return {row: found[row] for row in study.rows if row in found}
