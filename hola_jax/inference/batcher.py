"""Many requests over a fixed number of slots: each slot is one row of one batch, and holds one memory of constant size.

One thread owns the device. Between two pieces of written tokens it reads at most one long piece of prompts, so that those
who write wait little for those who come. A row's tokens do not depend on its slot or on its neighbours.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hola_jax.inference import programs
from hola_jax.inference.generator import Delta, Generator, Request, Writer, stop_table
from hola_jax.inference.prefix import Prefix, new_memory, width_of, write_row
from hola_jax.inference.sampling import GREEDY, settings

Deliver = Callable[[Delta | Exception], None]


class QueueFull(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The batcher takes no more requests."""


@dataclasses.dataclass(eq=False)
class Job:
    """One row's prompt, on its way through a slot."""

    tokens: np.ndarray
    request: Request
    deliver: Deliver  # called from the batcher's thread; the last delta has a finish, or there is an exception
    row: int = 0  # what its deltas call it
    cancelled: bool = False
    writer: Writer | None = None


@dataclasses.dataclass
class Counters:
    """What has happened since the start."""

    admitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    written_tokens: int = 0
    busy_seconds: float = 0.0


class Batcher:
    """Runs jobs. `submit` from any thread; `close` ends the thread."""

    def __init__(self, generator: Generator, slots: int = 8, queue: int = 64) -> None:
        for name, value in (("slots", slots), ("queue", queue)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        self.generator, self.slots, self.queue = generator, slots, queue
        self.counters = Counters()
        self.waiting: deque[Job] = deque()
        self.rows: list[Job | None] = [None] * slots
        self._reading: tuple[Job, Iterator[Prefix]] | None = None
        self._prefix: Prefix | None = None  # what has been read of it
        self._unread = 0
        self._changed, self._closing = threading.Condition(), False
        self._reset()
        self.thread = threading.Thread(target=self._run, name="hola-batcher", daemon=True)
        self.thread.start()

    def _reset(self) -> None:
        width = width_of(self.slots)
        self.memory = new_memory(self.generator.config, width)
        self.left = np.zeros(width, np.int32)
        self._stale = True  # settings and stops are not those of the rows
        self._read: np.ndarray | None = None  # the tokens of which `_prefix` is the whole memory

    @property
    def active(self) -> int:
        """Slots in use."""
        return sum(job is not None for job in self.rows)

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all of the jobs or none."""
        for job in jobs:
            self.generator.check(job.request, len(job.tokens))
        with self._changed:
            if self._closing:
                raise Closed("the server is stopping")
            if len(self.waiting) + len(jobs) > self.queue:
                self.counters.refused += len(jobs)
                raise QueueFull(f"{len(self.waiting)} requests wait and {self.queue} may; try again later")
            self.waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nothing more is delivered of these; their slots are free after the piece under way."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Refuses what comes, ends what runs after its piece, and waits for the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.thread.join()

    def warm_up(self) -> None:
        """Compiles all that requests need; the first of them then waits no longer than the others."""
        done = threading.Event()
        errors: list[Exception] = []

        def deliver(what: Delta | Exception) -> None:
            if isinstance(what, Exception):
                errors.append(what)
            done.set()

        length = self.generator.pieces[0] + (1 if len(self.generator.pieces) > 1 else 0)
        if self.generator.capacity is not None:
            length = max(1, min(length, self.generator.capacity - 1))
        self.submit([Job(np.zeros(length, np.int32), Request(max_tokens=1, stop_tokens=()), deliver)])
        done.wait()
        if errors:
            raise errors[0]
        self.counters = Counters()

    def _run(self) -> None:
        try:
            while self._has_work():
                start = time.perf_counter()
                try:
                    self._drop_cancelled()
                    self._read_some()
                    self._write_some()
                except Exception as error:  # of the device: whom it hit is told, and the next find it working again
                    self._fail_rows(error)
                    self._reset()
                self.counters.busy_seconds += time.perf_counter() - start
        finally:
            self._end()

    def _has_work(self) -> bool:
        """Waits for it; False when there is to be none."""
        with self._changed:
            while not (self._closing or self.waiting or self._reading or self.active):
                self._changed.wait()
            return not self._closing

    def _drop_cancelled(self) -> None:
        with self._changed:
            kept = [job for job in self.waiting if not job.cancelled]
            self.counters.cancelled += len(self.waiting) - len(kept)
            self.waiting = deque(kept)
        if self._reading is not None and self._reading[0].cancelled:
            self._reading = None
            self.counters.cancelled += 1
        for slot, job in enumerate(self.rows):
            if job is not None and job.cancelled:
                self._free(slot)
                self.counters.cancelled += 1

    def _free(self, slot: int) -> None:
        self.rows[slot] = None
        self.left[slot] = 0

    def _read_some(self) -> None:
        """Reads prompts into free slots, about one long piece of them at a time."""
        budget = self.generator.pieces[0]
        while None in self.rows and budget > 0:
            if self._reading is None:
                with self._changed:
                    if not self.waiting:
                        return
                    job = self.waiting.popleft()
                if self._read is job.tokens and self._prefix is not None:  # several answers to one prompt
                    self._admit(job, self._prefix)
                    continue
                self._reading = job, self.generator.reading([job.tokens])
                self._unread, self._prefix, self._read = len(job.tokens), None, None
            job, pieces = self._reading
            try:
                self._prefix = next(pieces)
            except StopIteration:
                assert self._prefix is not None
                self._reading, self._read = None, job.tokens
                self.counters.prompt_tokens += len(job.tokens)
                self._admit(job, self._prefix)
                continue
            except Exception as error:
                self._reading = None
                self._fail(job, error)
                continue
            size = self.generator.next_piece(self._unread)
            self._unread -= size
            budget -= size

    def _admit(self, job: Job, prefix: Prefix) -> None:
        slot = self.rows.index(None)
        self.memory = write_row(self.memory, np.int32(slot), prefix.memory, np.int32(0))
        job.writer = Writer(self.generator, job.request, job.tokens.tolist())
        self.rows[slot], self.left[slot], self._stale = job, job.request.max_tokens, True
        self.counters.admitted += 1

    def _write_some(self) -> None:
        if not self.left.any():
            return
        if self._stale:
            requests = [None if job is None else job.request for job in self.rows]
            width = len(self.left)
            samplings = [GREEDY if request is None else request.sampling for request in requests]
            self._settings = settings(samplings, [0 if r is None else r.seed for r in requests], width)
            self._stops = stop_table([() if r is None else self.generator.stop_tokens(r) for r in requests], width)
            self._stale = False
        tokens, self.memory, left = programs.write(
            self.generator.structure,
            self.generator.steps,
            self.generator.params,
            self.memory,
            self._settings,
            self.left,
            self._stops,
        )
        found, self.left = np.asarray(tokens), np.array(left)
        for slot, job in enumerate(self.rows):
            if job is not None:
                self._deliver(slot, job, found[:, slot])

    def _deliver(self, slot: int, job: Job, column: np.ndarray) -> None:
        if (column == programs.NOT_FINITE).any():
            self._free(slot)
            self._fail(job, FloatingPointError("the model's logits are NaN or infinite"))
            return
        assert job.writer is not None
        text, kept = job.writer.take(column[column >= 0].tolist())
        self.counters.written_tokens += len(kept)
        if job.writer.finish:
            self._free(slot)
            self.counters.finished += 1
        self._tell(job, Delta(job.row, text, kept, job.writer.finish))

    def _fail(self, job: Job, error: Exception) -> None:
        self.counters.failed += 1
        self._tell(job, error)

    def _tell(self, job: Job, what: Delta | Exception) -> None:
        if job.cancelled:
            return
        try:
            job.deliver(what)
        except Exception:  # whoever listened is gone
            job.cancelled = True

    def _fail_rows(self, error: Exception) -> None:
        jobs = [job for job in self.rows if job is not None]
        self.rows = [None] * self.slots
        self.left[:] = 0
        for job in jobs:
            self._fail(job, error)

    def _end(self) -> None:
        """Tells everyone that nothing more comes."""
        stopping = Closed("the server is stopping")
        with self._changed:
            self._closing = True
            waiting = [*self.waiting, *([self._reading[0]] if self._reading else [])]
            self.waiting.clear()
            self._reading = None
        for job in waiting:
            self._fail(job, stopping)
        self._fail_rows(stopping)
