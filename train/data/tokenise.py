"""The unit of work of `hola prepare`: some input files to one shard per split and a report, the same bytes each time.

The report is written last. Who finds it knows that the shards are whole, and need not do the work again.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from train.data import files, jsonl
from train.data.config import Split
from train.data.shard_writer import ShardWriter
from train.data.shards import SUFFIX
from train.data.tokenizers import Tokenizer

BATCH = 2**20  # characters that are tokenised in one call


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the bytes of the output, besides the input."""

    tokenizer_hash: str
    token_type: str
    record_tokens: int
    field: str
    held_out_fraction: float
    """Of the documents of the training files, by their hash."""


@dataclasses.dataclass(frozen=True)
class Input:
    path: str
    name: str
    """Below the folder that all input files share."""
    bytes: int


@dataclasses.dataclass(frozen=True)
class Task:
    """Input files that become one shard."""

    name: str
    split: Split
    inputs: tuple[Input, ...]

    @property
    def report(self) -> str:
        return f"reports/{self.name}.json"

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.inputs)


class TooManyMalformed(ValueError):
    pass


def run(task: Task, settings: Settings, tokenizer: Tokenizer, out: str, max_malformed: int) -> None:
    """Does the task; afterwards its shards and its report are in `out`."""
    work = _Work(task, settings, tokenizer, out, max_malformed)
    try:
        for each in task.inputs:
            work.read(each)
        files.write(f"{out}/{task.report}", work.report())
    finally:
        work.discard()
        files.remove(work.mark)


def held_out(text: bytes, fraction: float) -> bool:
    """Whether a document is held out: by its hash, so it is wherever it stands, and so are its copies."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < fraction * 2**64


class _Work:
    """One task under way."""

    def __init__(self, task: Task, settings: Settings, tokenizer: Tokenizer, out: str, max_malformed: int) -> None:
        self.task, self.settings, self.tokenizer, self.max_malformed = task, settings, tokenizer, max_malformed
        self.writers: dict[str, ShardWriter] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self.out, self.mark = out, f"{out}/reports/{task.name}.at"
        self.inputs: list[dict[str, Any]] = []
        self.malformed: list[dict[str, Any]] = []
        self.passed, self.marked = 0, 0.0

    def read(self, each: Input) -> None:
        digest, counts = hashlib.sha256(), {"documents": 0, "empty": 0, "malformed": 0}
        waiting: list[str] = []
        size = 0
        stored = self._counted(files.chunks(each.path, digest))
        for line in jsonl.documents(stored, each.name, self.settings.field):
            if line.text is None:
                counts["malformed"] += 1
                self._complain(each, line)
                continue
            counts["documents" if line.text else "empty"] += 1
            waiting.append(line.text)
            size += len(line.text)
            if size > BATCH:
                self._tokenise(waiting)
                waiting, size = [], 0
        self._tokenise(waiting)
        for _ in stored:
            pass  # what a damaged stream left unread belongs to the sha256
        self.inputs.append({"file": each.name, "bytes": each.bytes, "sha256": digest.hexdigest(), **counts})

    def _counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The chunks, with a mark left now and then of how far they have come, for the progress bar."""
        for chunk in chunks:
            yield chunk
            self.passed += len(chunk)
            if time.monotonic() - self.marked > (20 if files.is_remote(self.out) else 1):
                self.marked = time.monotonic()
                files.write(self.mark, str(self.passed).encode())

    def _complain(self, each: Input, line: jsonl.Line) -> None:
        self.malformed.append({"file": each.name, "line": line.number, "reason": line.reason})
        if len(self.malformed) > self.max_malformed:
            raise TooManyMalformed(
                f"{each.path}, line {line.number}: {line.reason}; with it more than {self.max_malformed} lines are "
                "malformed (--max-malformed)"
            )

    def _tokenise(self, texts: list[str]) -> None:
        texts = [text for text in texts if text]
        for text, tokens in zip(texts, self.tokenizer.encode(texts), strict=True):
            data = text.encode()
            split = self.task.split
            if split == "train" and held_out(data, self.settings.held_out_fraction):
                split = "held_out"
            self._add(split, tokens, len(data))

    def _add(self, split: Split, tokens: np.ndarray, size: int) -> None:
        if split not in self.writers:
            file = f"{split}/{self.task.name}{SUFFIX}"
            self.writers[split] = ShardWriter(self.out, file, self.settings.record_tokens, self.settings.token_type)
            self.counts[split] = {"documents": 0, "tokens": 0, "bytes": 0}
        writer, counts = self.writers[split], self.counts[split]
        writer.begin()
        writer.add(tokens)
        writer.add(np.array([self.tokenizer.eos]))
        for name, more in (("documents", 1), ("tokens", len(tokens) + 1), ("bytes", size)):
            counts[name] += more

    def report(self) -> bytes:
        """Finishes the shards and says what they hold; what fills no record goes into the report itself."""
        splits = {}
        for split in sorted(self.writers):
            writer = self.writers[split]
            rest = base64.b64encode(writer.rest()).decode()
            shard = writer.finish()
            splits[split] = {**self.counts[split], "rest": rest, "shard": shard and dataclasses.asdict(shard)}
        found = {
            "settings": dataclasses.asdict(self.settings),
            "inputs": self.inputs,
            "malformed": self.malformed,
            "splits": splits,
        }
        return json.dumps(found, indent=1, ensure_ascii=False).encode()

    def discard(self) -> None:
        for writer in self.writers.values():
            writer.discard()
