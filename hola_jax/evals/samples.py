"""A sample of a recall task, and samples kept on disk: what was made once for a setting is read the next time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = 1  # of the files, and of what the generators make: a change of either is a new number


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and what should follow it."""

    prompt: str
    references: tuple[str, ...]
    depths: tuple[float, ...]
    """Where in the context what each reference asks for stands, 0 its beginning, 1 its end."""
    stale: str | None = None
    """A value that was right until it was written over."""


def stored(cache: Path | None, setting: dict[str, Any], make: Callable[[], list[Sample]]) -> list[Sample]:
    """The samples of a setting, from the folder `cache` where they were made before; None keeps nothing.

    The setting names all that decides the samples: task, length, count, seed, hashes of the tokenizer and of the haystack.
    """
    if cache is None:
        return make()
    setting = {"format": FORMAT, **setting}
    head = json.dumps(setting, sort_keys=True)
    path = (
        cache / f"{re.sub(r'[^a-z0-9]+', '-', setting['task'])}-{hashlib.sha256(head.encode()).hexdigest()[:16]}.jsonl"
    )
    found = _read(path, head)
    if found is None:
        found = make()
        _write(path, head, found)
    return found


def _read(path: Path, head: str) -> list[Sample] | None:
    """None where the file is not there, is of another setting or was not written whole."""
    if not path.is_file():
        return None
    first, *lines = path.read_text().splitlines() or [""]
    try:
        samples = [Sample(**{name: _frozen(value) for name, value in json.loads(line).items()}) for line in lines[:-1]]
        whole = first == head and lines[-1] == f"{len(samples)} samples"
    except (ValueError, TypeError, IndexError):
        return None
    return samples if whole else None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _write(path: Path, head: str, samples: list[Sample]) -> None:
    """The file appears whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [head, *(json.dumps(dataclasses.asdict(sample)) for sample in samples), f"{len(samples)} samples"]
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write("\n".join(lines) + "\n")
    os.replace(file.name, path)
