"""`hola prepare`: JSON lines of text to a folder of tokenised record shards, on Apache Beam."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Iterator
from typing import Annotated, Any

import tyro

from train.data import assemble, files, inputs, jsonl, tokenise, tokenizers
from train.data.manifest import Made, Manifest
from train.data.record import token_type
from train.data.tokenise import Input, Settings, Task
from train.data.tokenizers import Tokenizer
from train.progress import Progress

DEFAULT_HELD_OUT = 0.01
COPY = "tokenizer.json"  # the copy of the tokenizer in the folder
SAMPLED_FILES = 100  # files that a tokenizer is learnt from, at most


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Turn JSON lines of text into tokenised shards for training: `hola prepare FOLDER --out SHARDS`.

    FOLDER may hold *.jsonl.zst, as SlimPajama's, *.jsonl and *.jsonl.gz. What is done is kept: after any interruption run
    the same command again. docs/data.md says what SHARDS holds.
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders, globs or files to train on, local or gs://."""
    out: str
    """The folder to make, local or gs://."""
    tokenizer: str = "mistral-v1"
    """`bytes`, `mistral-v1`, or the path of a tokenizers JSON."""
    train_tokenizer: int | None = None
    """Learn a byte-level BPE of so many entries from the inputs first, and use that."""
    train_tokenizer_mb: int = 50
    """How much text to learn it from, in megabytes spread over the inputs."""
    held_out: tuple[str, ...] = ()
    """Folders, globs or files to hold out (SlimPajama's validation); they are left out of the inputs."""
    held_out_fraction: float | None = None
    """Share of the documents to hold out, chosen by their hash: 0.01 unless there is --held-out."""
    field: str = "text"
    """Of each JSON object, the one with the text."""
    record_tokens: int = 2048
    """Tokens of a record, what is shuffled. Longer rows take several neighbours."""
    max_malformed: int = 1000
    """Malformed lines to report and go on after; one more stops the run."""
    runner: str = "DirectRunner"
    """Of Beam: DirectRunner (this machine), DataflowRunner, FlinkRunner, SparkRunner."""
    workers: int = 0
    """Processes of the DirectRunner; 0 is one per core."""
    pipeline_options: str = ""
    """Handed to Beam as they are, in one string: "--project=p --region=r --temp_location=gs://b/tmp"."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("hola prepare is given no inputs; name folders, globs or files with JSON lines")
        if self.record_tokens < 1:
            raise ValueError(f"--record-tokens is {self.record_tokens}; it must be at least 1")
        if self.max_malformed < 0 or self.workers < 0:
            raise ValueError("--max-malformed and --workers must be at least 0")
        if self.held_out and self.held_out_fraction is not None:
            raise ValueError("--held-out and --held-out-fraction are two ways to hold out text; give one of them")
        if not 0 <= self.fraction < 1:
            raise ValueError(f"--held-out-fraction is {self.held_out_fraction}; it must be at least 0 and below 1")

    @property
    def fraction(self) -> float:
        if self.held_out:
            return 0.0
        return DEFAULT_HELD_OUT if self.held_out_fraction is None else self.held_out_fraction

    def run(self) -> None:
        tasks = self._tasks()
        tokenizer, data = self._tokenizer(tasks)
        settings = Settings(
            tokenizer.hash, token_type(tokenizer.vocab_size), self.record_tokens, self.field, self.fraction
        )
        reports = self._reports(tasks, settings)
        missing = [task for task in tasks if task.name not in reports]
        if len(missing) < len(tasks):
            print(f"{len(tasks) - len(missing)} of {len(tasks)} shards are done already")
        if missing:
            self._work(missing, settings, (tokenizer.name, data))
            reports = self._reports(tasks, settings)
        lost = [task.name for task in tasks if task.name not in reports]
        if lost:
            raise OSError(f"{self.out}/reports lacks {lost[0]} and {len(lost) - 1} more after the run; run it again")
        made = Made(tokenizer.name, tokenizer.hash, tokenizer.vocab_size, tokenizer.eos, None if data is None else COPY)
        self._finish(tasks, reports, settings, made)

    def _tasks(self) -> list[Task]:
        held_out = inputs.found(self.held_out, "--held-out")
        aside = {each.path for each in held_out}
        training = [each for each in inputs.found(self.inputs, "inputs") if each.path not in aside]
        return inputs.tasks(training, "train") + inputs.tasks(held_out, "held_out")

    def _tokenizer(self, tasks: list[Task]) -> tuple[Tokenizer, bytes | None]:
        """The tokenizer and its JSON, of which the folder keeps a copy: with it the data can be read back anywhere."""
        path = f"{self.out}/{COPY}"
        there = files.read(path)
        if self.train_tokenizer is None:
            tokenizer = tokenizers.load(self.tokenizer)
            if not isinstance(tokenizer, tokenizers.Json):
                return tokenizer, None
            data = tokenizer.data
        elif there is not None:
            data = there
        else:
            data = tokenizers.train_bpe(self.sample(tasks), self.train_tokenizer)
        tokenizer = tokenizers.Json(data, COPY)
        if there is None:
            files.write(path, data)
        elif there != data:
            raise ValueError(f"{path} is another tokenizer than {self.tokenizer}; use that, or another --out")
        return tokenizer, data

    def sample(self, tasks: list[Task]) -> Iterator[str]:
        """Text for the tokenizer, as much of each of some training files, none of it held out."""
        every = [each for task in tasks if task.split == "train" for each in task.inputs]
        chosen = every[:: -(-len(every) // SAMPLED_FILES)]
        share = self.train_tokenizer_mb * 10**6 // max(1, len(chosen))
        for each in Progress("tokenizer", len(chosen)).over(chosen):
            yield from self._texts(each, share)

    def _texts(self, each: Input, most: int) -> Iterator[str]:
        for line in jsonl.documents(files.chunks(each.path), each.name, self.field):
            if line.text and not tokenise.held_out(line.text.encode(), self.fraction):
                yield line.text[:most]
                most -= len(line.text)
            if most <= 0:
                return

    def _reports(self, tasks: list[Task], settings: Settings) -> dict[str, dict[str, Any]]:
        sizes = assemble.sizes_in(self.out)
        found = {task.name: assemble.report_of(task, settings, self.out, sizes) for task in tasks}
        return {name: report for name, report in found.items() if report is not None}

    def _work(self, tasks: list[Task], settings: Settings, tokenizer: tuple[str, bytes | None]) -> None:
        from train.data import pipeline

        work = pipeline.Tokenise(settings, tokenizer, self.out, self.max_malformed)
        with _Watch(tasks, self.out):
            pipeline.run(tasks, work, self.runner, self.workers or cores(), self.pipeline_options)

    def _finish(self, tasks: list[Task], reports: dict[str, dict[str, Any]], settings: Settings, made: Made) -> None:
        malformed = [each for report in reports.values() for each in report["malformed"]]
        if len(malformed) > self.max_malformed:
            raise ValueError(
                f"{len(malformed)} lines are malformed, more than --max-malformed {self.max_malformed}: the first is "
                f"{_where(malformed[0])}; {self.out}/reports has them all"
            )
        if not sum(split["documents"] for report in reports.values() for split in report["splits"].values()):
            raise ValueError(f"{', '.join(self.inputs)} hold no documents with text in the field {self.field!r}")
        _say(assemble.assemble(tasks, reports, settings, made, self.out), self.out)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _where(malformed: dict[str, Any]) -> str:
    return f"{malformed['file']}, line {malformed['line']}: {malformed['reason']}"


def _say(manifest: Manifest, out: str) -> None:
    for line in manifest.malformed[:10]:
        print(f"malformed: {_where(line)}")
    if more := manifest.malformed[10:]:
        print(f"malformed: and {len(more)} lines more, listed in {out}/manifest.json")
    for name, split in manifest.splits.items():
        print(
            f"{name:9}{split.documents:12,} documents{split.bytes / 1e6:12,.1f} MB of text{split.tokens:16,} tokens"
            f"{len(split.shards):6,} shards"
        )
    print(f"made with {manifest.tokenizer.name}, {manifest.tokenizer.vocab_size} entries: {out}")


class _Watch:
    """A progress bar over the tasks' input, fed from the reports and marks that they leave in the folder."""

    def __init__(self, tasks: list[Task], out: str) -> None:
        self.tasks, self.out = tasks, out
        self.progress = Progress("prepare, MB", max(1, sum(task.bytes for task in tasks) // 10**6))
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.progress.show(0)
        self.thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.progress.show(self.progress.total if kind is None else self._passed(), last=True)

    def _watch(self) -> None:
        while not self.over.wait(30 if files.is_remote(self.out) else 1):
            self.progress.show(self._passed())

    def _passed(self) -> int:
        there = {each.path.rpartition("/")[2] for each in files.listed(f"{self.out}/reports/*")}
        done = sum(task.bytes for task in self.tasks if f"{task.name}.json" in there)
        marks = [files.read(f"{self.out}/reports/{t.name}.at") for t in self.tasks if f"{t.name}.at" in there]
        return (done + sum(int(json.loads(mark)) for mark in marks if mark)) // 10**6
