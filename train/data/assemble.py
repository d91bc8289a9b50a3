"""From the reports of all tasks to the manifest: the last step of `hola prepare`, the only one that needs them all."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
from typing import Any

from train.data import files
from train.data.config import Split
from train.data.manifest import NAME, Made, Manifest, Shard, SplitCounts
from train.data.record import unpack
from train.data.shard_writer import ShardWriter
from train.data.shards import SUFFIX
from train.data.tokenise import Settings, Task

SPLITS: tuple[Split, ...] = ("train", "held_out")


def report_of(task: Task, settings: Settings, out: str, sizes: dict[str, int]) -> dict[str, Any] | None:
    """The report of a task that is done, None if it is not; `sizes` are the files that `out` holds."""
    if task.report not in sizes:
        return None
    report = json.loads(files.read(f"{out}/{task.report}") or b"")
    if differences := [
        f"{name} was {report['settings'].get(name)!r} and is {value!r}"
        for name, value in dataclasses.asdict(settings).items()
        if report["settings"].get(name) != value
    ]:
        raise ValueError(f"{out} was begun with other settings: {'; '.join(differences)}. Use those, or another --out")
    shards = [split["shard"] for split in report["splits"].values() if split["shard"]]
    return report if all(sizes.get(shard["file"]) == shard["bytes"] for shard in shards) else None


def sizes_in(out: str) -> dict[str, int]:
    """The size of every file of a folder, by its path below it."""
    root = out.rstrip("/") + "/"
    return {each.path.removeprefix(root): each.bytes for each in files.listed(root + "**")}


def assemble(tasks: list[Task], found: dict[str, dict[str, Any]], settings: Settings, made: Made, out: str) -> Manifest:
    """Puts the manifest into `out`, and with it the tokens that filled no record; what it does not list is removed."""
    reports = [found[task.name] for task in tasks]
    manifest = Manifest(
        tokenizer=made,
        token_type=settings.token_type,
        record_tokens=settings.record_tokens,
        splits={split: _split(reports, split, settings, out) for split in SPLITS},
        inputs=tuple(each for report in reports for each in report["inputs"]),
        malformed=tuple(each for report in reports for each in report["malformed"]),
        settings=dataclasses.asdict(settings),
    )
    files.write(f"{out}/{NAME}", manifest.to_json())
    _remove_stale(manifest, tasks, out)
    return manifest


def _split(reports: list[dict[str, Any]], name: Split, settings: Settings, out: str) -> SplitCounts:
    found = [report["splits"][name] for report in reports if name in report["splits"]]
    shards = [Shard(**each["shard"]) for each in found if each["shard"]]
    rest = _rest([base64.b64decode(each["rest"]) for each in found], name, settings, out)
    if rest is not None:
        shards.append(rest)
    counts = {key: sum(each[key] for each in found) for key in ("documents", "tokens", "bytes")}
    return SplitCounts(records=sum(shard.records for shard in shards), shards=tuple(shards), **counts)


def _rest(records: list[bytes], split: Split, settings: Settings, out: str) -> Shard | None:
    """One shard of the tokens that filled no record in theirs: nothing is lost, and only its last record is short."""
    name = files.short_hash(repr(records))  # another content has another name: an older manifest stays true meanwhile
    writer = ShardWriter(out, f"{split}/rest-{name}{SUFFIX}", settings.record_tokens, settings.token_type)
    for record in records:
        tokens, starts = unpack(record, settings.token_type)
        bounds = sorted({0, *map(int, starts), len(tokens)})
        for start, stop in itertools.pairwise(bounds):
            writer.begin()
            writer.add(tokens[start:stop])
    return writer.finish(short=True)


def _remove_stale(manifest: Manifest, tasks: list[Task], out: str) -> None:
    """Removes the shards and reports of other inputs, and what an interrupted run has left."""
    listed = {shard.file for split in manifest.splits.values() for shard in split.shards}
    kept = listed | {task.report for task in tasks}
    ours = ("reports/", *(f"{split}/" for split in SPLITS))
    for file in sizes_in(out):
        if file not in kept and (file.startswith(ours) or file.endswith(files.UNFINISHED)):
            files.remove(f"{out}/{file}")
