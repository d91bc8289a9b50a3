"""The part of a document that a study writes: its table and plots, between two marks; the prose around them stays."""

from __future__ import annotations

import os
from pathlib import Path

from train.study.config import Study
from train.study.plot import svg
from train.study.results import Results, curves, lengths, table
from train.whole import write_whole


def section(study: Study, results: Results, command: str, plots: dict[str, str]) -> list[str]:
    """Markdown; `plots` are files by what they show."""
    steps, tokens = study.base.steps, study.base.steps * study.base.global_batch * study.base.row
    return [
        f"### {study.title}",
        "",
        study.question,
        "",
        f"`{command}`: {steps:,} steps, {tokens:,} tokens a run; {len(results)} of {len(study.cells())} runs are done. Mean "
        f"and standard deviation over seeds; in brackets, on how many seeds a row beats {next(iter(study.rows))}.",
        "",
        *table(study, results),
        *(line for shows, file in plots.items() for line in ("", f"![{study.title}: {shows}]({file})")),
    ]


def write_page(page: Path, study: Study, results: Results, folder: Path, command: str) -> None:
    """Puts the study's section where the page has it, or at its end; the plots go beside the result files."""
    name, plots, drawn = folder.name, {}, {}
    if along := curves(study, results):
        drawn[name, "held-out nats along the runs"] = svg(along, "tokens seen", "held-out nats a token")
    if by_length := lengths(study, results):
        scored = study.measures[study.across[0]].shows
        drawn[f"{name}-lengths", f"{scored} by length"] = svg(by_length, "tokens of a row", scored, logarithmic=True)
    for (file, shows), picture in drawn.items():
        path = folder.parent / f"{file}.svg"
        write_whole(path, picture)
        plots[shows] = Path(os.path.relpath(path, page.parent)).as_posix()
    begin, end = f"<!-- study {name} -->", f"<!-- end of study {name} -->"
    whole = "\n".join([begin, *section(study, results, command, plots), end])
    text = page.read_text() if page.is_file() else "# Results\n"
    if begin in text:
        before, _, rest = text.partition(begin)
        if end not in rest:
            raise ValueError(f"{page} has the line {begin} without {end}; put that back, or delete both")
        text = before + whole + rest.partition(end)[2]
    else:
        text = text.rstrip("\n") + "\n\n" + whole + "\n"
    write_whole(page, text)
