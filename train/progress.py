"""A progress bar on one console line, with the time left; on a pipe, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

T = TypeVar("T")
WIDTH = 24


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """Counts to `total` from `first`, what was done before; `note` is what stands behind the bar."""

    def __init__(self, label: str, total: int, stream: TextIO | None = None, first: int = 0) -> None:
        self.label, self.total, self.note, self.first = label, total, "", first
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.start = time.monotonic()
        self.shown = -1e9

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items, counted as they are asked for; the line is finished with the last."""
        self.start = time.monotonic()
        for done, item in enumerate(items):
            self.show(done)
            yield item
        self.show(self.total, last=True)

    def show(self, done: int, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.shown < (0.1 if self.live else 15.0):
            return
        self.shown = now
        spent = now - self.start
        here = done - self.first
        left = "" if last or not here else f", {clock(spent / here * (self.total - done))} left"
        filled = WIDTH * done // max(self.total, 1)
        bar = "#" * filled + "." * (WIDTH - filled)
        line = f"{self.label} [{bar}] {done}/{self.total}  {clock(spent)}{left}  {self.note}"
        end = "\n" if last or not self.live else ""
        self.stream.write(("\r\x1b[K" if self.live else "") + line + end)
        self.stream.flush()
