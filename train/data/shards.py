"""A prepared folder as one line of tokens per split, examined before anything is read from it."""

from __future__ import annotations

import hashlib
import resource
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import grain
import numpy as np
from etils import epath

from train.data import manifest as manifests
from train.data import tokenizers
from train.data.config import Records
from train.data.manifest import Made, Manifest, Shard
from train.data.record import array_record, checksum, unpack

FULL_CHECK = 2**30  # bytes of shards up to which "auto" reads them all at start
SUFFIX = ".array_record"


class StoredTokens:
    """The tokens of a split's shards, in the manifest's order."""

    def __init__(self, root: str, manifest: Manifest, split: str) -> None:
        found = manifest.splits[split]
        self.record, self.kind, self.count = manifest.record_tokens, manifest.token_type, found.tokens
        self.shards = found.shards
        self.ends = np.cumsum([shard.records for shard in self.shards])
        self.root = root
        allow_files(2 * len(self.shards))
        self.source = grain.sources.ArrayRecordDataSource([f"{root}/{s.file}[0:{s.records}]" for s in self.shards])

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.empty(stop - start, np.int32)
        begins = np.zeros(stop - start, bool)
        for number in range(start // self.record, -(-stop // self.record)):
            first = number * self.record
            found, places = self._record(number)
            low, high = max(start, first), min(stop, first + self.record)
            tokens[low - start : high - start] = found[low - first : high - first]
            places = places[(places >= low - first) & (places < high - first)]
            begins[places + np.int64(first - start)] = True
        return tokens, begins

    def _record(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            return unpack(self.source[number], self.kind)
        except (RuntimeError, ValueError, IndexError) as error:
            shard = self.shards[int(np.searchsorted(self.ends, number, side="right"))]
            raise OSError(
                f"{self.root}/{shard.file} cannot be read (record {number} of the split): {error}; prepare the data again"
            ) from error


def allow_files(count: int) -> None:
    """Lets this process keep so many files open, and some more, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def read_manifest(root: str) -> Manifest:
    """The manifest of a prepared folder."""
    path = epath.Path(root) / manifests.NAME
    if not path.exists():
        raise FileNotFoundError(
            f"{root} holds no {manifests.NAME}: it is no folder of `hola prepare`, or one it did not finish; run it again"
        )
    return manifests.from_json(path.read_bytes(), str(path))


def tokenizer_of(source: Records, manifest: Manifest) -> Made:
    """The tokenizer the folder was made with, if its file and what the source asks for say the same."""
    made = manifest.tokenizer
    if made.file is not None:
        path = epath.Path(source.path) / made.file
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: the manifest names it as the tokenizer of the data")
        _same(made, hashlib.sha256(path.read_bytes()).hexdigest(), str(path))
    if source.tokenizer is not None:
        is_hash = len(source.tokenizer) == 64 and set(source.tokenizer) <= set("0123456789abcdef")
        wanted = source.tokenizer if is_hash else tokenizers.load(source.tokenizer).hash
        _same(made, wanted, f"the tokenizer asked for, {source.tokenizer},")
    return made


def _same(made: Made, found: str, what: str) -> None:
    if found != made.hash:
        raise ValueError(
            f"{what} has the hash {found[:12]}, but the data was made with {made.name}, hash {made.hash[:12]}; "
            "use that tokenizer, or prepare the data again with yours"
        )


def examine(root: str, manifest: Manifest, check: Literal["auto", "size", "full"]) -> None:
    """Raises what is wrong with the folder's shards: missing, unlisted, of another size, unreadable, or altered."""
    listed = {shard.file: shard for split in manifest.splits.values() for shard in split.shards}
    folder = epath.Path(root)
    present = {
        f"{split}/{path.name}"
        for split in manifest.splits
        if (folder / split).exists()
        for path in (folder / split).iterdir()
        if path.name.endswith(SUFFIX) and not path.name.startswith(".")
    }
    if missing := sorted(listed.keys() - present):
        raise FileNotFoundError(
            f"{folder / missing[0]} is missing ({_rest(missing)}); restore it or prepare the data again"
        )
    if unlisted := sorted(present - listed.keys()):
        raise ValueError(
            f"{folder / unlisted[0]} is not in the manifest ({_rest(unlisted)}): `hola prepare` did not finish; run it again"
        )
    full = check == "full" or (check == "auto" and sum(shard.bytes for shard in listed.values()) <= FULL_CHECK)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda shard: _examine_shard(folder / shard.file, shard, full), listed.values()))


def _rest(names: list[str]) -> str:
    return "the only one" if len(names) == 1 else f"and {len(names) - 1} more"


def _examine_shard(path: epath.Path, shard: Shard, full: bool) -> None:
    size = path.stat().length
    if size != shard.bytes:
        raise ValueError(
            f"{path} has {size} bytes, the manifest says {shard.bytes}; restore it or prepare the data again"
        )
    try:
        reader = array_record().ArrayRecordReader(str(path), options="readahead_buffer_size:0,max_parallelism:0")
        records = reader.num_records()
        if records:
            reader.read([0, records - 1])
        reader.close()
    except RuntimeError as error:
        raise ValueError(f"{path} is corrupt: {error}; restore it or prepare the data again") from error
    if records != shard.records:
        raise ValueError(
            f"{path} is corrupt: it holds {records} records, the manifest says {shard.records}; "
            "restore it or prepare the data again"
        )
    if full and checksum(path) != shard.sha256:
        raise ValueError(f"{path} is corrupt: its sha256 is not the manifest's; restore it or prepare the data again")
