"""Files to read, list and write, local or where Apache Beam's file systems reach. One appears whole or not at all."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from train.data.record import EXTRA

CHUNK = 2**18
REMOTE = "://"
UNFINISHED = ".tmp"


class Found(NamedTuple):
    path: str
    bytes: int


def beam_files() -> Any:
    """Beam's file systems, or an ImportError that says what to install."""
    before = logging.root.manager.disable
    try:
        logging.disable(max(before, logging.WARNING))  # it warns of clouds' packages that are not needed
        from apache_beam.io.filesystems import FileSystems
    except ImportError as error:
        raise ImportError(EXTRA.format("apache-beam"), name=error.name) from error
    finally:
        logging.disable(before)
    return FileSystems


def is_remote(path: str) -> bool:
    return REMOTE in path


def listed(pattern: str) -> list[Found]:
    """The files that a glob matches, by name."""
    matches = beam_files().match([pattern])[0].metadata_list
    return sorted(Found(found.path, found.size_in_bytes) for found in matches)


def chunks(path: str, digest: Any = None) -> Iterator[bytes]:
    """The stored bytes of a file, which `digest` sees as they pass."""
    from apache_beam.io.filesystem import CompressionTypes

    stored = CompressionTypes.UNCOMPRESSED  # as it is: `jsonl` decompresses, and notices a stream that ends early
    with open(path, "rb") if not is_remote(path) else beam_files().open(path, compression_type=stored) as file:
        while chunk := file.read(CHUNK):
            if digest is not None:
                digest.update(chunk)
            yield chunk


def read(path: str) -> bytes | None:
    """A file's bytes, None where there is no such file."""
    if is_remote(path):
        return b"".join(chunks(path)) if beam_files().exists(path) else None
    return Path(path).read_bytes() if os.path.exists(path) else None


def write(path: str, data: bytes) -> None:
    """Puts the bytes there, whole or not at all."""
    with working_file(path) as place:
        Path(place.local).write_bytes(data)
        place.publish()


class working_file:
    """A local file to write, with `publish` to put it in its place once it is whole; left unpublished it disappears."""

    def __init__(self, path: str) -> None:
        self.path = path
        folder, name = (tempfile.gettempdir(), Path(path).name) if is_remote(path) else os.path.split(path)
        os.makedirs(folder or ".", exist_ok=True)
        self.local = os.path.join(folder, f"{name}.{os.getpid()}{UNFINISHED}")

    def __enter__(self) -> working_file:
        return self

    def publish(self) -> None:
        with open(self.local, "rb+") as file:
            os.fsync(file.fileno())
            if is_remote(self.path):
                with beam_files().create(self.path, mime_type="application/octet-stream") as target:
                    shutil.copyfileobj(file, target)
        if not is_remote(self.path):
            os.replace(self.local, self.path)

    def __exit__(self, *_: object) -> None:
        if os.path.exists(self.local):
            os.remove(self.local)


def remove(path: str) -> None:
    """Removes a file if it is there."""
    if is_remote(path):
        if beam_files().exists(path):
            beam_files().delete([path])
    elif os.path.exists(path):
        os.remove(path)


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
