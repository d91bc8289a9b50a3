"""Several processes as one: joining them, stopping them together, and not waiting for one that is dead."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

import jax
from jax.experimental import multihost_utils

from train.config import ClusterConfig

PREEMPTED = 75  # exit code (EX_TEMPFAIL): stopped from outside and saved; start the same command again
LOST = 76  # exit code (EX_PROTOCOL): another process is gone; start all of them again


def join(config: ClusterConfig) -> None:
    """Makes this process one of several, where the configuration says so."""
    if not config.join:
        return
    jax.distributed.initialize(
        config.coordinator,
        config.processes,
        config.process,
        heartbeat_timeout_seconds=config.heartbeat,
        shutdown_timeout_seconds=config.heartbeat,
    )


class StopRequest:
    """Whether to save and stop: after SIGTERM, at the same step in every process."""

    def __init__(self) -> None:
        self.received = False
        self.together = jax.process_count() > 1  # then jax's own handler hears the signal and tells all processes
        if not self.together and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def reached(self, step: int) -> bool:
        """Asked after every step."""
        return multihost_utils.reached_preemption_sync_point(step) if self.together else self.received


def leave(message: str) -> None:
    """Ends this process at once, without the farewell that waits for the others."""
    print(f"hola: {message}", file=sys.stderr, flush=True)
    os._exit(LOST)


class Watchdog:
    """Ends the process when no step was made for `timeout` seconds; a collective waits for a dead process forever."""

    def __init__(self, timeout: float) -> None:
        self.timeout, self.last, self.resting = timeout, time.monotonic(), jax.process_count() == 1
        if not self.resting:
            threading.Thread(target=self._watch, daemon=True).start()

    def beat(self) -> None:
        self.last = time.monotonic()

    def rest(self) -> None:
        """The run is over."""
        self.resting = True

    def _watch(self) -> None:
        while not self.resting:
            if time.monotonic() - self.last > self.timeout:
                leave(
                    f"no step for {self.timeout:.0f} s (cluster.step_timeout): another process is gone or hangs; start all "
                    "again, and the run goes on from its last checkpoint"
                )
            time.sleep(min(1.0, self.timeout / 10))
