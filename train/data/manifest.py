"""manifest.json: what a folder of record shards holds. It is written last, so a folder without one is unfinished."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

FORMAT = 1
NAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file."""

    file: str
    """Its path below the folder."""
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """The shards of one split in their order, and what they hold together."""

    documents: int
    tokens: int
    """Ends of documents included. records = ceil(tokens / record_tokens): only the last record is short."""
    bytes: int
    """Of text, as UTF-8."""
    records: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Made:
    """The tokenizer that made the tokens."""

    name: str
    hash: str
    vocab_size: int
    eos: int
    file: str | None
    """Its JSON below the folder, where it has one."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    tokenizer: Made
    token_type: str
    record_tokens: int
    splits: dict[str, SplitCounts]
    inputs: tuple[dict[str, Any], ...]
    """Each input file: its name, bytes, sha256, documents, how many of them were empty, how many lines malformed."""
    malformed: tuple[dict[str, Any], ...]
    """Each malformed line: file, line, reason."""
    settings: dict[str, Any]

    def to_json(self) -> bytes:
        return (
            json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, ensure_ascii=False) + "\n"
        ).encode()


def from_json(data: bytes, where: str) -> Manifest:
    """The manifest in these bytes; `where` names them in errors."""
    try:
        found = json.loads(data)
        version = found.pop("format")
        if version != FORMAT:
            raise ValueError(f"it is of format {version}, and this version reads {FORMAT}")
        found["tokenizer"] = Made(**found["tokenizer"])
        found["splits"] = {name: _split(split) for name, split in found["splits"].items()}
        return Manifest(**{**found, "inputs": tuple(found["inputs"]), "malformed": tuple(found["malformed"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{where} is no manifest of `hola prepare`: {error}; prepare the data again") from error


def _split(found: dict[str, Any]) -> SplitCounts:
    return SplitCounts(**{**found, "shards": tuple(Shard(**shard) for shard in found["shards"])})
