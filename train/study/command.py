"""`hola study`: runs what a study lacks, each run in a process of its own, and prints the table."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

from train.config import RunError
from train.study.config import Cell, Study, load
from train.study.page import write_page
from train.study.results import Results, read_results, same_run, table, write_result
from train.workers import Job, Workers


@dataclasses.dataclass(frozen=True)
class RunStudy:
    """Train and measure the rows of a table, each with every seed: `hola study configs/study/reads.py`.

    Every finished run leaves one small file below --results and is not made again; a run that was stopped goes on from its
    last checkpoint. So the same command continues whatever interrupted it, and prints what is left.
    """

    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE [FILE ...]")]
    """Python files with a `study = Study(...)` in them."""
    jobs: int = 1
    """Runs at a time."""
    only: tuple[str, ...] = ()
    """Rows to train; unless given, all."""
    seeds: tuple[int, ...] = ()
    """Seeds to train with, of the study's own; unless given, all."""
    show: bool = False
    """Train nothing: print the table of what is done, and what is left."""
    page: str | None = None
    """A Markdown file whose section of the study is written anew."""
    results: str = "docs/results"
    """Folder of result files, one folder in it to a study."""
    runs: str = "runs/study"
    """Folder of the runs themselves."""

    def run(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"--jobs is {self.jobs}; it must be at least 1")
        studies = {file: load(file) for file in self.files}
        if not studies:
            raise ValueError("no study is named; configs/study/ has some")
        wanted = {file: self._wanted(study) for file, study in studies.items()}
        for file, study in studies.items():
            read_results(study, self._folder(file))  # what does not belong to a table is said before anything runs
        failed = []
        for file, study in studies.items():
            done = read_results(study, self._folder(file))
            left = [cell for cell in wanted[file] if cell not in done]
            if not self.show:
                left = [cell for cell in left if not self._taken(study, cell, self._folder(file))]
            if left and not self.show:
                failed += Workers(self.jobs, told).run([self._job(file, cell) for cell in left])
            self._tell(file, study, read_results(study, self._folder(file)))
        if failed:
            raise RunError(f"{len(failed)} of the runs failed: {'; '.join(failed)}. The same command tries them again")

    def _folder(self, file: str) -> Path:
        return Path(self.results) / Path(file).stem

    def _job(self, file: str, cell: Cell) -> Job:
        runs = Path(self.runs) / Path(file).stem
        arguments = [file, cell.row, str(cell.seed), os.fspath(self._folder(file)), os.fspath(runs)]
        return Job(cell.name, ("train.study.cell", *arguments), runs / f"{cell.name}.log")

    def _taken(self, study: Study, cell: Cell, folder: Path) -> bool:
        """Whether another study had the same run, whose result is this cell's now."""
        found = same_run(study, cell, folder)
        if found is not None:
            write_result(folder, cell, found[1])
            told(f"{cell.name} is the run of {found[0]}")
        return found is not None

    def _wanted(self, study: Study) -> list[Cell]:
        for name, asked, known in (("only", self.only, study.rows), ("seeds", self.seeds, study.seeds)):
            unknown = [each for each in asked if each not in known]
            if unknown:
                raise ValueError(f"--{name} names {unknown[0]!r}; the study has {', '.join(map(str, known))}")
        cells = study.cells()
        cells = [cell for cell in cells if not self.only or cell.row in self.only]
        return [cell for cell in cells if not self.seeds or cell.seed in self.seeds]

    def _tell(self, file: str, study: Study, results: Results) -> None:
        print("\n".join(["", study.title, "", *table(study, results)]))
        left = [cell.name for cell in study.cells() if cell not in results]
        if left:
            print(f"\n{len(left)} of {len(study.cells())} runs are left: {', '.join(left)}")
        if self.page is not None and results:
            write_page(Path(self.page), study, results, self._folder(file), f"hola study {file}")


def told(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
