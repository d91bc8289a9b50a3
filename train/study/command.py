"""`hola study`: runs what a study lacks, each run in a process of its own, and prints the table."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from train.config import RunError
from train.progress import clock
from train.study.config import Cell, Study, load
from train.study.page import write_page
from train.study.results import Results, read_results, same_run, table, write_result

TRIES = 2  # of a run: what killed the first, if it was from outside, does not kill the next


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
                failed += Workers(file, self._folder(file), Path(self.runs) / Path(file).stem, self.jobs).run(left)
            self._tell(file, study, read_results(study, self._folder(file)))
        if failed:
            raise RunError(f"{len(failed)} of the runs failed: {'; '.join(failed)}. The same command tries them again")

    def _folder(self, file: str) -> Path:
        return Path(self.results) / Path(file).stem

    def _taken(self, study: Study, cell: Cell, folder: Path) -> bool:
        """Whether another study had the same run, whose result is this cell's now."""
        found = same_run(study, cell, folder)
        if found is not None:
            write_result(folder, cell, found[1])
            print(f"{cell.name} is the run of {found[0]}", file=sys.stderr, flush=True)
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


class Workers:
    """The processes of a study's runs, so many at a time."""

    def __init__(self, file: str, results: Path, runs: Path, jobs: int) -> None:
        self.file, self.results, self.runs, self.jobs = file, results, runs, jobs
        self.at_work: dict[Cell, subprocess.Popen[bytes]] = {}

    def run(self, cells: list[Cell]) -> list[str]:
        """A line for each cell that failed. Stopped from outside, the runs save and stop as well."""
        waiting, tries = list(cells), dict.fromkeys(cells, 0)
        failed: dict[Cell, str] = {}
        done, begun = 0, time.monotonic()
        self.runs.mkdir(parents=True, exist_ok=True)
        before = signal.signal(signal.SIGTERM, _as_interrupt)
        try:
            while waiting or self.at_work:
                while waiting and len(self.at_work) < self.jobs:
                    cell = waiting.pop(0)
                    tries[cell] += 1
                    self.at_work[cell] = self._start(cell)
                cell, code = self._next_finished()
                if code == 0:
                    done += 1
                    failed.pop(cell, None)
                    spent = time.monotonic() - begun
                    ahead = spent / done * (len(cells) - done - len(failed))
                    line = f"done [{done}/{len(cells)}] in {clock(spent)}, about {clock(ahead)} left"
                else:
                    line = f"ended with {code}: {self._last_words(cell)}"
                    failed[cell] = f"{cell.name} {line}"
                    if tries[cell] < TRIES:
                        waiting.append(cell)
                        line += "; it is tried again"
                print(f"{cell.name} {line}", file=sys.stderr, flush=True)
        finally:
            signal.signal(signal.SIGTERM, before)
            self._stop()
        return list(failed.values())

    def _start(self, cell: Cell) -> subprocess.Popen[bytes]:
        print(f"{cell.name} begins; its words are in {self._log(cell)}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "train.study.cell", self.file, cell.row, str(cell.seed)]
        with self._log(cell).open("ab") as log:
            # A session of its own: Ctrl-C reaches the runs through `_stop`, which lets them save.
            return subprocess.Popen(
                [*command, os.fspath(self.results), os.fspath(self.runs)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _log(self, cell: Cell) -> Path:
        return self.runs / f"{cell.name}.log"

    def _next_finished(self) -> tuple[Cell, int]:
        while True:
            for cell, process in self.at_work.items():
                code = process.poll()
                if code is not None:
                    del self.at_work[cell]
                    return cell, code
            time.sleep(0.2)

    def _last_words(self, cell: Cell) -> str:
        lines = [line for line in self._log(cell).read_text(errors="replace").splitlines() if line.strip()]
        return f"{lines[-1][:300] if lines else 'without a word'} (all of it in {self._log(cell)})"

    def _stop(self) -> None:
        """SIGTERM to what is still at work, which saves and stops."""
        for process in self.at_work.values():
            process.terminate()
        for process in self.at_work.values():
            process.wait()
        self.at_work.clear()


def _as_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
