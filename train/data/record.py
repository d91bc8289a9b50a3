"""One record of a shard: so many tokens, and where among them documents begin.

    uint32       how many documents begin here
    uint32 each  the places of their first tokens
    uint16 or uint32 each, as the manifest says: the tokens

All little endian. A document runs on from record to record of a shard; a shard's first token always begins one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

EXTRA = "reading and writing ArrayRecord shards needs {}: pip install 'hola-jax[prepare]'"


def array_record() -> Any:
    """The package's module of readers and writers, or an ImportError that says what to install."""
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise ImportError(EXTRA.format("array-record"), name=error.name) from error
    return array_record_module


def token_type(vocab_size: int) -> str:
    """The narrower of the two types that holds every token."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def pack(tokens: np.ndarray, starts: np.ndarray, kind: str) -> bytes:
    """The record of these tokens; `starts` are the places where documents begin."""
    head = np.concatenate([[len(starts)], starts]).astype("<u4")
    return head.tobytes() + tokens.astype(np.dtype(kind).newbyteorder("<")).tobytes()


def unpack(record: bytes, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, places where documents begin) of a record, views of its bytes."""
    count = int(np.frombuffer(record, "<u4", 1)[0])
    starts = np.frombuffer(record, "<u4", count, 4)
    return np.frombuffer(record, np.dtype(kind).newbyteorder("<"), -1, 4 + 4 * count), starts


def checksum(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
