"""A long line of tokens that can be read anywhere: from memory here, from record shards in `shards`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np


class Tokens(Protocol):
    """Tokens in the order they are stored, `record` to a record; only the last record may be short."""

    record: int

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, whether a document begins there) of the places from start to stop."""
        ...


class InMemory:
    """Whole documents, one after the other, each with its end token."""

    def __init__(self, documents: Iterable[np.ndarray], eos: int, record: int, kind: str = "uint32") -> None:
        pieces = [np.append(document, eos).astype(kind) for document in documents if len(document)]
        self.tokens = np.concatenate(pieces) if pieces else np.zeros(0, kind)
        self.begins = np.zeros(len(self.tokens), bool)
        self.begins[np.cumsum([0, *map(len, pieces)])[:-1]] = True
        self.record = record

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens[start:stop], self.begins[start:stop]
