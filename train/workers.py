"""Runs as processes of their own, so many at a time: `hola study` and `hola demo` are made of them."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from train.progress import clock

TRIES = 2  # of a job: what killed the first, if it was from outside, does not kill the next


@dataclasses.dataclass(frozen=True)
class Job:
    """`python -m` what is to run, which goes on where it was stopped. Its words go to the end of `log`."""

    name: str
    module: tuple[str, ...]
    log: Path

    def last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{lines[-1][:300] if lines else 'without a word'} (all of it in {self.log})"


def nothing() -> None:
    """What is done while the processes work, unless something is."""


class Workers:
    """So many processes at a time. `say` is told of each that begins and ends; `watch` is called a few times a second."""

    def __init__(
        self,
        at_a_time: int,
        say: Callable[[str], None],
        watch: Callable[[], None] = nothing,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.at_a_time, self.say, self.watch, self.environment = at_a_time, say, watch, environment
        self.at_work: dict[Job, subprocess.Popen[bytes]] = {}

    def run(self, jobs: Sequence[Job]) -> list[str]:
        """A line for each job that failed. Stopped from outside, the processes save and stop as well."""
        waiting, tries = list(jobs), dict.fromkeys(jobs, 0)
        failed: dict[Job, str] = {}
        done, begun = 0, time.monotonic()
        before = signal.signal(signal.SIGTERM, _as_interrupt)
        try:
            while waiting or self.at_work:
                while waiting and len(self.at_work) < self.at_a_time:
                    job = waiting.pop(0)
                    tries[job] += 1
                    self.at_work[job] = self._start(job)
                job, code = self._next_finished()
                if code == 0:
                    done += 1
                    failed.pop(job, None)
                    spent = time.monotonic() - begun
                    ahead = spent / done * (len(jobs) - done - len(failed))
                    line = f"done [{done}/{len(jobs)}] in {clock(spent)}, about {clock(ahead)} left"
                else:
                    line = f"ended with {code}: {job.last_words()}"
                    failed[job] = f"{job.name} {line}"
                    if tries[job] < TRIES:
                        waiting.append(job)
                        line += "; it is tried again"
                self.say(f"{job.name} {line}")
        finally:
            signal.signal(signal.SIGTERM, before)
            self._stop()
        return list(failed.values())

    def _start(self, job: Job) -> subprocess.Popen[bytes]:
        self.say(f"{job.name} begins; its words are in {job.log}")
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches the runs through `_stop`, which lets them save.
            return subprocess.Popen(
                [sys.executable, "-m", *job.module],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=None if self.environment is None else os.environ | self.environment,
                start_new_session=True,
            )

    def _next_finished(self) -> tuple[Job, int]:
        while True:
            self.watch()
            for job, process in self.at_work.items():
                code = process.poll()
                if code is not None:
                    del self.at_work[job]
                    return job, code
            time.sleep(0.2)

    def _stop(self) -> None:
        """SIGTERM to what is still at work, which saves and stops."""
        for process in self.at_work.values():
            process.terminate()
        for process in self.at_work.values():
            process.wait()
        self.at_work.clear()


def _as_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
