"""The small files that a study's runs leave, and the table that they make."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from train.config import TrainConfig, as_dict, differences
from train.overrides import from_dict
from train.study.config import Cell, Measure, Study
from train.whole import write_whole

DIGITS = {"accuracy": ".3f", "perplexity": ".2f", "spike": ".1f", "sink": ".2f"}
Result = dict[str, Any]
Results = dict[Cell, Result]


def write_result(folder: Path, cell: Cell, result: Result) -> None:
    write_whole(folder / f"{cell.name}.json", json.dumps(result, indent=1) + "\n")


def settings_of(result: Result) -> dict[str, Any]:
    """As `Study.settings` has them; a setting that came later than the result is at its default."""
    made = result["settings"]
    measures = {}
    for name, values in made["measures"].items():
        measures[name] = from_dict(Measure, {key: value for key, value in values.items() if key != "kind"})
    return as_dict({"train": from_dict(TrainConfig, made["train"]), "measures": measures})


def read_results(study: Study, folder: Path) -> Results:
    """Of the cells that are done. One that was made with other settings is an error: it would not belong to the table."""
    found = {}
    for cell in study.cells():
        path = folder / f"{cell.name}.json"
        if not path.is_file():
            continue
        try:
            result = json.loads(path.read_text())
            made = settings_of(result)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no result of a study ({error!r}); delete it, and the run is made again"
            ) from error
        changed = differences(made, study.settings(cell))
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(
                f"{path} was made with other settings ({'; '.join(changed[:3])}{more}); delete it, and the run is made again"
            )
        found[cell] = result
    return found


def same_run(study: Study, cell: Cell, folder: Path) -> tuple[Path, Result] | None:
    """A result of another study beside `folder` that was made with the very settings of the cell, and where it is."""
    settings = study.settings(cell)
    for path in sorted(folder.parent.glob("*/*.json")):
        try:
            result = json.loads(path.read_text())
            if settings_of(result) == settings:
                return path, {**result, "row": cell.row}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # no result of a study; the study whose folder it is in says so
    return None


def value(study: Study, measure: str, result: Result) -> float:
    """What the table shows of a measure; NaN where a model has no such thing."""
    numbers, shows = result["measures"][measure], study.measures[measure].shows
    found = math.exp(numbers["nats"]) if shows == "perplexity" else numbers[shows]
    return math.nan if found is None else float(found)


def better(study: Study, measure: str, one: float, other: float) -> bool:
    return one > other if study.measures[measure].shows == "accuracy" else one < other


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
            if not values or any(map(math.isnan, values.values())):
                entries.append("")
                continue
            digits = DIGITS[study.measures[measure].shows]
            text = f"{statistics.mean(values.values()):{digits}}"
            if len(values) > 1:
                text += f" ± {statistics.stdev(values.values()):{digits}}"
            firsts = {seed: value(study, measure, theirs[seed]) for seed in values.keys() & theirs.keys()}
            both = [seed for seed, found in firsts.items() if not math.isnan(found)]
            if row != first and both:
                wins = sum(better(study, measure, values[seed], firsts[seed]) for seed in both)
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


def lengths(study: Study, results: Results) -> dict[str, list[list[tuple[float, float]]]]:
    """{row: for each seed what `study.across` measured}, against the length of the measured rows."""
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for cell, result in results.items():
        points = [(study.measures[name].length or study.base.row, value(study, name, result)) for name in study.across]
        if points:
            found.setdefault(cell.row, []).append(sorted(points))
    return {row: found[row] for row in study.rows if row in found}
