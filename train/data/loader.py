"""The door: a source to rows by number, and rows to the batches of one process.

    rows = open_source(Records("slimpajama"), split="train", vocab_size=32000, row=2048, seed=0)
    for batch in batches(rows, position=rows_consumed, global_batch=64): ...

The position is one number, the rows consumed by all processes together; nothing else is needed to go on.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from train.data import folder, shards, tokenizers
from train.data.config import Facts, Mixture, Part, Records, Source, Split, Text
from train.data.facts import FactRows
from train.data.record import token_type
from train.data.rows import PackedRows, Row, derived_seed
from train.data.tokens import InMemory, Tokens


class MapRows(Protocol):
    """rows[i] is {"tokens" int32, "segment_ids" int32, "mask"}, each [T+1]; the same for the same (seed, i), any i.

    Segments count from 1 in each row. mask[t] says how often token t+1 counts when it is predicted from token t: 0 or 1, or
    a number. Rows without end have
    the length sys.maxsize.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


def open_source(source: Source, *, split: Split, vocab_size: int, row: int, seed: int) -> MapRows:
    """The rows of a split, all that can be wrong with the data said before the first: the training split is shuffled
    anew each epoch and has no end; the held-out one is in stored order and ends."""
    if row < 1:
        raise ValueError(f"rows of {row} tokens are asked for; a row has at least 1")
    found = identity(source)
    if found["vocab_size"] > vocab_size:
        raise ValueError(
            f"the data's tokenizer {found['tokenizer']} has {found['vocab_size']} tokens, more than the model's "
            f"vocabulary of {vocab_size}; set the model's vocab_size to at least {found['vocab_size']}"
        )
    if isinstance(source, Mixture):
        parts = [_rows(part, split, row, derived_seed(seed, "part", n)) for n, (_, part) in enumerate(source.parts)]
        return grain.MapDataset.mix(parts, [weight for weight, _ in source.parts])
    return _rows(source, split, row, derived_seed(seed, "source"))


def identity(source: Source) -> dict[str, Any]:
    """{"tokenizer", "hash", "vocab_size"} of the numbers in the rows: what a checkpoint keeps and compares at resume."""
    if isinstance(source, Mixture):
        return _identity_of_parts([part for _, part in source.parts])
    if isinstance(source, Facts):
        return {**_identity_of_noise(source), "vocab_size": _first(source) + 2 * source.kinds}
    if isinstance(source, Records):
        made = shards.tokenizer_of(source, shards.read_manifest(source.path))
        return {"tokenizer": made.name, "hash": made.hash, "vocab_size": made.vocab_size}
    tokenizer = tokenizers.load(source.tokenizer)
    return {"tokenizer": tokenizer.name, "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}


def _identity_of_parts(parts: list[Part]) -> dict[str, Any]:
    """The one tokenizer of all parts; facts among no text have none to disagree with, but need their numbers."""
    found = {part: identity(part) for part in parts}
    texts = [part for part in found if not (isinstance(part, Facts) and part.noise is None)]
    for part in texts[1:]:
        if found[part]["hash"] != found[texts[0]]["hash"]:
            raise ValueError(
                f"a Mixture joins the tokenizers {found[texts[0]]['tokenizer']} of {texts[0]} and "
                f"{found[part]['tokenizer']} of {part}; prepare both with one"
            )
    chosen = found[texts[0] if texts else parts[0]]
    return {**chosen, "vocab_size": max(each["vocab_size"] for each in found.values())}


def _identity_of_noise(source: Facts) -> dict[str, Any]:
    if source.noise is not None:
        return identity(source.noise)
    return {"tokenizer": "facts", "hash": hashlib.sha256(f"hola facts {source.kinds}".encode()).hexdigest()}


def _first(source: Facts) -> int:
    """The first token behind those of the noise."""
    return source.kinds if source.noise is None else int(identity(source.noise)["vocab_size"])


def _rows(source: Part, split: Split, row: int, seed: int) -> MapRows:
    if isinstance(source, Facts):
        noise = None if source.noise is None else _shuffled(source.noise, split, row, derived_seed(seed, "noise"))
        return grain.MapDataset.source(FactRows(source, row, derived_seed(seed, split), _first(source), noise))
    if split == "train":
        return grain.MapDataset.source(_shuffled(source, split, row, seed))
    tokens = _tokens(source, split, row)
    if len(tokens) <= row:
        raise ValueError(
            f"the held_out split of {source} has {len(tokens)} tokens, not one row of {row}; hold out more, or ask for less"
        )
    return grain.MapDataset.source(PackedRows(tokens, row, None))


def _shuffled(source: Text, split: Split, row: int, seed: int) -> PackedRows:
    """Rows of a split without end, in another order each epoch."""
    return PackedRows(_tokens(source, split, row), row, seed)


def _tokens(source: Text, split: Split, row: int) -> Tokens:
    if isinstance(source, Records):
        manifest = shards.read_manifest(source.path)
        shards.examine(source.path, manifest, source.check)
        tokens: Tokens | None = None
        if split in manifest.splits and manifest.splits[split].tokens:
            tokens = shards.StoredTokens(source.path, manifest, split)
    else:
        documents, tokenizer = folder.documents(source, split)
        tokens = InMemory(documents, tokenizer.eos, row, token_type(tokenizer.vocab_size))
    if not tokens:
        raise ValueError(f"{source} has no tokens in its {split} split; it needs some")
    return tokens


@dataclasses.dataclass(frozen=True)
class _Share:
    """One process's rows in the order it takes them: `local` of each global batch."""

    rows: MapRows
    position: int
    global_batch: int
    local: int
    process: int

    def __len__(self) -> int:
        if len(self.rows) == sys.maxsize:
            return sys.maxsize
        return max(0, len(self.rows) - self.position) // self.global_batch * self.local

    def __getitem__(self, index: Any) -> Row:
        batch, within = divmod(int(index), self.local)
        return self.rows[self.position + batch * self.global_batch + self.process * self.local + within]


def batches(
    rows: MapRows,
    *,
    position: int,
    global_batch: int,
    process: int = 0,
    processes: int = 1,
    threads: int = 2,
    workers: int = 0,
    prefetch: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of each global batch, [global_batch / processes, T+1] of each array, from `position` on.

    The global batches do not depend on how many processes share them. Up to `prefetch` batches are read ahead, by
    `threads` of this process or, where `workers` is not 0, by so many processes with as many threads each.
    """
    if position < 0:
        raise ValueError(f"position is {position}; it is the number of rows consumed so far, 0 or more")
    if not 0 <= process < processes:
        raise ValueError(f"process is {process}; of {processes} processes it is one of 0 to {processes - 1}")
    if global_batch < 1 or global_batch % processes:
        raise ValueError(
            f"global_batch is {global_batch}; it must be a multiple of the number of processes, {processes}"
        )
    local = global_batch // processes
    share = grain.MapDataset.source(_Share(rows, position, global_batch, local, process)).batch(
        local, drop_remainder=True
    )
    found = share.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads)))
    if not workers:
        return iter(found)
    if not flags.FLAGS.is_parsed():  # grain's processes read absl's flags, which only absl's own main parses
        flags.FLAGS.mark_as_parsed()
    apart = iter(found.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)))
    atexit.register(apart.close)  # before the interpreter takes the processes' queues apart
    return apart
