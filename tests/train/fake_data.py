"""A stand-in for `train.data.loader`: rows made from their number, so that what was read can be told from the losses."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class FakeSource:
    name: str = "fake"


class Rows:
    def __init__(self, source, split, row, seed):
        self.key, self.row = (seed, split == "held_out"), row
        self.spoilt = source.name == "spoilt"

    def __getitem__(self, index):
        draw = np.random.default_rng((*map(int, self.key), index))
        tokens = (draw.integers(0, 8) + np.arange(self.row + 1) * draw.integers(1, 4)) % 32
        segments = 1 + (np.arange(self.row + 1) >= draw.integers(1, self.row)).astype(np.int32)
        if self.spoilt and index >= 96:
            tokens[3] = 32  # no such token: the loss is NaN from step 13 on
        return {"tokens": tokens.astype(np.int32), "segment_ids": segments}


def identity(source):
    return {"tokenizer": source.name, "hash": source.name * 2, "vocab_size": 32}


def open_source(source, *, split, vocab_size, row, seed):
    return Rows(source, split, row, seed)


def batches(rows, *, position, global_batch, process=0, processes=1):
    local = global_batch // processes
    while True:
        found = [rows[position + process * local + i] for i in range(local)]
        yield {name: np.stack([row[name] for row in found]) for name in found[0]}
        position += global_batch
