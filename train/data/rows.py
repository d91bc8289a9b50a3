"""Rows of any length out of a line of tokens, without waste: row i is tokens i*T to i*T+T, and the one after.

The line is cut into units of whole records, at least a row long; each epoch has them in another order, and the epochs follow
one another without a gap. So every token of an epoch is the input of exactly one row, and a row is found by arithmetic.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import grain
import numpy as np

from train.data.tokens import Tokens

Row = dict[str, np.ndarray]


def derived_seed(seed: int, *names: object) -> int:
    """A 32-bit seed for one use: neighbouring seeds and uses share nothing, as grain's seed + epoch alone would."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


class PackedRows:
    """rows[i] of a line of tokens, for any i; `shuffle` None keeps the stored order and ends with the line."""

    def __init__(self, tokens: Tokens, row: int, shuffle: int | None) -> None:
        self.tokens, self.row, self.endless = tokens, row, shuffle is not None
        self.unit = tokens.record * -(-row // tokens.record)
        self.whole = len(tokens) // self.unit  # units in full; what is left behind them stays the last of each epoch
        order = grain.MapDataset.range(self.whole) if self.whole else None
        self.order = order.shuffle(shuffle) if order is not None and shuffle is not None else order

    def __len__(self) -> int:
        return sys.maxsize if self.endless else (len(self.tokens) - 1) // self.row

    def __getitem__(self, index: Any) -> Row:
        row = int(index)
        return packed(self._pieces(row * self.row, self.row + 1))

    def _pieces(self, place: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The stored pieces that lie at `place` of the endless line, `count` tokens together."""
        pieces = []
        while count:
            epoch, within = divmod(place, len(self.tokens))
            unit, offset = divmod(within, self.unit)
            stored = self.unit * self._stored_unit(epoch, unit)
            stop = min(stored + offset + count, stored + self.unit, len(self.tokens))
            pieces.append(self.tokens.read(stored + offset, stop))
            taken = stop - stored - offset
            place, count = place + taken, count - taken
        return pieces

    def _stored_unit(self, epoch: int, unit: int) -> int:
        return unit if self.order is None or unit == self.whole else int(self.order[epoch * self.whole + unit])


def packed(pieces: list[tuple[np.ndarray, np.ndarray]]) -> Row:
    """One row of the pieces: a new segment where a document begins and where two pieces meet."""
    begins = np.concatenate([begins for _, begins in pieces])
    begins[np.cumsum([0] + [len(tokens) for tokens, _ in pieces[:-1]])] = True
    segments = np.cumsum(begins, dtype=np.int32)
    return {
        "tokens": np.concatenate([tokens for tokens, _ in pieces]).astype(np.int32),
        "segment_ids": segments,
        "mask": np.append(segments[1:] == segments[:-1], False),
    }
