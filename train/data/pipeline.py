"""The tasks of `hola prepare` on Apache Beam: each task is one element, and its shards and report are its result.

The DirectRunner here is Beam's FnApiRunner, a process per core; the name "DirectRunner" itself would first try to download
another runner.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
import threading

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo, FnApiRunner
from apache_beam.runners.portability.portable_runner import JobServiceHandle
from apache_beam.transforms.environments import SubprocessSDKEnvironment

from train.data import tokenise, tokenizers
from train.data.tokenise import Settings, Task


class Refused(ValueError):
    """What stopped a task, in words for the user."""


class Tokenise(beam.DoFn):
    """Does the tasks it is given."""

    def __init__(self, settings: Settings, tokenizer: tuple[str, bytes | None], out: str, max_malformed: int) -> None:
        self.settings, self.named, self.out, self.max_malformed = settings, tokenizer, out, max_malformed

    def setup(self) -> None:
        tokenizers.one_thread()
        self.tokenizer = tokenizers.named(*self.named)

    def process(self, task: Task) -> None:
        try:
            tokenise.run(task, self.settings, self.tokenizer, self.out, self.max_malformed)
        except (ValueError, OSError) as error:
            raise Refused(f"<<refused: {error}>>") from error


def run(tasks: list[Task], work: Tokenise, runner: str, workers: int, options: str) -> None:
    """Does all tasks, or raises what stopped one. The largest come first, so that no core waits long for another."""
    ordered = sorted(tasks, key=lambda task: -task.bytes)
    workers = min(workers, len(tasks))
    mine = [f"--direct_num_workers={workers}"] if runner == "DirectRunner" else []
    chosen = PipelineOptions([*mine, *shlex.split(options)])
    pipeline = beam.Pipeline(runner=_this_machine(chosen, workers) if mine else runner, options=chosen)
    _ = pipeline | beam.Create(ordered, reshuffle=False) | beam.Reshuffle() | beam.ParDo(work)
    try:
        with _Processes():
            pipeline.run().wait_until_finish()
    except Exception as error:
        refused = re.search(r"<<refused: (.*?)>>", str(error), re.DOTALL)  # Beam hands on the words, not the type
        if refused is None:
            raise
        raise Refused(f"{refused[1].rstrip('.')}. What is done is kept: run the same command again to go on.") from None


class _Processes:
    """Ends the run when one of this machine's processes dies (by the system's want of memory, say): Beam would wait on."""

    def __enter__(self) -> None:
        self.death = ""
        self.main = threading.get_ident()
        self.before = threading.excepthook, signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.excepthook = self._said

    def _said(self, given: threading.ExceptHookArgs) -> None:
        if given.thread is not None and given.thread.name == "run_worker" and not self.death:
            self.death = str(given.exc_value)
            signal.pthread_kill(self.main, signal.SIGINT)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        threading.excepthook = self.before[0]
        signal.signal(signal.SIGINT, self.before[1])
        if kind is KeyboardInterrupt and self.death:
            raise Refused(f"<<refused: a process died: {self.death}>>")


def _this_machine(options: PipelineOptions, workers: int) -> FnApiRunner:
    """Beam's runner with so many processes, or none besides this one."""
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # what stops a task is said once, by `hola`
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    handed_on = ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded))
    if workers == 1:
        return FnApiRunner(provision_info=handed_on)
    command = shlex.join([sys.executable, "-m", "train.data.worker", str(os.getpid())])
    return FnApiRunner(SubprocessSDKEnvironment.from_command_string(command), provision_info=handed_on)
