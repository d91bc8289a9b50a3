"""Writes one shard: documents in, records of a fixed number of tokens out, and the tokens that fill no record."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np

from train.data.files import working_file
from train.data.manifest import Shard
from train.data.record import array_record, checksum, pack

OPTIONS = "group_size:1,zstd:1"  # a record to a chunk: any is read without its neighbours


class ShardWriter:
    """A shard that appears at `root/file` when `finish` has put it there whole."""

    def __init__(self, root: str, file: str, record_tokens: int, kind: str) -> None:
        self.file, self.kind = file, kind
        self.place = working_file(f"{root}/{file}")
        self.writer = array_record().ArrayRecordWriter(self.place.local, OPTIONS)
        self.buffer = np.empty(record_tokens, kind)
        self.filled, self.records = 0, 0
        self.starts: list[int] = []

    def begin(self) -> None:
        """A document begins with the next token."""
        self.starts.append(self.filled)

    def add(self, tokens: np.ndarray) -> None:
        """Appends tokens to the current document."""
        while len(tokens):
            room = len(self.buffer) - self.filled
            taken, tokens = tokens[:room], tokens[room:]
            self.buffer[self.filled : self.filled + len(taken)] = taken
            self.filled += len(taken)
            if self.filled == len(self.buffer):
                self._flush()

    def rest(self) -> bytes:
        """The record of the tokens that fill none; the writer is empty afterwards."""
        starts = np.array([start for start in self.starts if start < self.filled], np.uint32)
        record = pack(self.buffer[: self.filled], starts, self.kind)
        self.filled, self.starts = 0, []
        return record

    def _flush(self) -> None:
        self._write(self.rest())

    def _write(self, record: bytes) -> None:
        try:
            self.writer.write(record)
        except RuntimeError as error:
            raise self._failed(str(error)) from error
        self.records += 1

    def finish(self, short: bool = False) -> Shard | None:
        """The shard, in its place; None if it has no records. `short` makes a last record of what fills none."""
        if short and self.filled:
            self._flush()
        try:
            self.writer.close()
            reader = array_record().ArrayRecordReader(self.place.local)
            found = reader.num_records()
            reader.close()
        except RuntimeError as error:
            raise self._failed(str(error)) from error
        if found != self.records:
            raise self._failed(f"{found} of {self.records} records arrived; is the disk full?")
        with self.place:
            if not self.records:
                return None
            local = Path(self.place.local)
            shard = Shard(self.file, self.records, local.stat().st_size, checksum(local))
            self.place.publish()
        return shard

    def _failed(self, reason: str) -> OSError:
        return OSError(f"cannot write {self.place.path}: {reason}")

    def discard(self) -> None:
        """Removes what was written of a shard that will not be finished."""
        with contextlib.suppress(RuntimeError):  # what cannot be written is what is being thrown away
            self.writer.close()
        if os.path.exists(self.place.local):
            os.remove(self.place.local)
