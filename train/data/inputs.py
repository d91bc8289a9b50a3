"""Which files `hola prepare` reads, and which of them become one shard together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from train.data import files, jsonl
from train.data.config import Split
from train.data.tokenise import Input, Task

SHARDS = 256  # small input becomes about so many shards, a file each at least; large input shards of
SHARD_BYTES = 2**29  # compressed text: a few minutes of work, and few enough files to keep open


def found(places: Iterable[str], option: str) -> list[Input]:
    """The input files at these folders, globs and paths, by name; a place that has none is an error."""
    names: dict[str, Input] = {}
    for place in places:
        inside = list(_below(place))
        if not inside:
            raise FileNotFoundError(f"{option}: {place} holds no file that ends in {', '.join(jsonl.SUFFIXES)}")
        for each in inside:
            if names.setdefault(each.name, each).path != each.path:
                raise ValueError(
                    f"{names[each.name].path} and {each.path} would both be called {each.name}; give the folder that "
                    "holds both instead"
                )
    return [names[name] for name in sorted(names)]


def _below(place: str) -> Iterator[Input]:
    pattern = place if place.endswith(jsonl.SUFFIXES) else re.sub(r"/*(\*\*)?$", "", place) + "/**"
    root = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    for path, size in files.listed(pattern):
        if path.endswith(jsonl.SUFFIXES):
            yield Input(path, path[len(root) :].lstrip("/"), size)


def tasks(inputs: list[Input], split: Split) -> list[Task]:
    """The files in their order, as many to a task as make a shard of a good size."""
    most = min(SHARD_BYTES, sum(each.bytes for each in inputs) // SHARDS)
    groups: list[list[Input]] = []
    for each in inputs:
        if not groups or sum(other.bytes for other in groups[-1]) + each.bytes > most:
            groups.append([])
        groups[-1].append(each)
    return [Task(_name(group, split), split, tuple(group)) for group in groups]


def _name(group: list[Input], split: Split) -> str:
    """Readable, and another where any file of the group is another."""
    stem = re.sub(
        r"[^A-Za-z0-9_-]+", "_", group[0].name.removesuffix(".zst").removesuffix(".gz").removesuffix(".jsonl")
    )
    return f"{stem[-80:]}-{files.short_hash(repr((split, [(each.name, each.bytes) for each in group])))}"
