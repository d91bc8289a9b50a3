"""Recall in plain text: tokens that end a repetition, how far back it stood, and how well a model knew them.

Where `context` tokens and the one behind them stood together before in a text, who remembers them knows the last. A
sequence that the training text has anywhere could be known by heart; what it never had can only be known from this text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


def sequences(tokens: np.ndarray, length: int, vocab_size: int) -> np.ndarray:
    """int64 [T - length + 1]: one number for each `length` neighbouring tokens, equal where they are."""
    if vocab_size**length >= 2**63:
        raise ValueError(f"{length} tokens out of {vocab_size} do not fit one number; ask for fewer")
    count = max(0, len(tokens) - length + 1)
    found = np.zeros(count, np.int64)
    for place in range(length):
        found = found * vocab_size + tokens[place : place + count]
    return found


def known_sequences(texts: Iterable[np.ndarray], length: int, vocab_size: int) -> np.ndarray:
    """The sequences of these texts, sorted, each once."""
    return np.unique(np.concatenate([sequences(text, length, vocab_size) for text in texts]))


def distances(tokens: np.ndarray, context: int, vocab_size: int, known: np.ndarray | None = None) -> np.ndarray:
    """int32 [T]: how many tokens ago each token stood last behind the same `context` tokens; 0 where it never did, and
    where the sequence is a `known` one."""
    found = np.zeros(len(tokens), np.int32)
    names = sequences(tokens, context + 1, vocab_size)
    order = np.argsort(names, kind="stable")
    repeats = names[order][1:] == names[order][:-1]
    found[context + order[1:][repeats]] = np.diff(order)[repeats]
    if known is not None:
        nearest = known[np.minimum(np.searchsorted(known, names), len(known) - 1)]
        found[context:][names == nearest] = 0
    return found


class Recall(NamedTuple):
    """Of some texts: sums over the tokens of each range of distances, [texts, ranges]."""

    asked: np.ndarray
    right: np.ndarray  # tokens that were the model's first guess
    nats: np.ndarray  # their negative log likelihood


def edges(window: int, block: int, longest: int) -> list[int]:
    """Ends of the ranges of distances: the block, all that a cache of the latest tokens sees, doublings of that, and all."""
    found = [block] if not window else [block, window + block]
    while 4 * found[-1] < longest:
        found.append(2 * found[-1])
    return found if longest <= found[-1] else [*found, longest]


def recall(
    distances: Sequence[np.ndarray], right: Sequence[np.ndarray], nats: Sequence[np.ndarray], edges: Sequence[int]
) -> Recall:
    """What a model knew of texts' repetitions; `distances`, `right` and `nats` are of each text, [T]."""
    sums = np.zeros((3, len(distances), len(edges)))
    for text, (far, hit, loss) in enumerate(zip(distances, right, nats, strict=True)):
        repeated = far > 0
        place = np.searchsorted(edges, far[repeated])
        for total, values in zip(sums[:, text], (np.ones(place.shape), hit[repeated], loss[repeated]), strict=True):
            total += np.bincount(place, values, minlength=len(edges))[: len(edges)]
    return Recall(*sums)


class Difference(NamedTuple):
    """Of two ratios of sums over the same texts."""

    value: float
    error: float  # its standard error, texts drawn anew

    @property
    def clear(self) -> bool:
        """Whether it is more than twice its standard error."""
        return abs(self.value) > 2 * self.error


def difference(mine: np.ndarray, other: np.ndarray, count: np.ndarray, draws: int = 1000) -> Difference:
    """sum(mine) / sum(count) - sum(other) / sum(count); each argument has a number for each text."""
    rows = np.random.default_rng(0).integers(len(count), size=(draws, len(count)))
    counts = count[rows].sum(1)
    drawn = (mine - other)[rows].sum(1)[counts > 0] / counts[counts > 0]  # what is not asked for tells nothing
    return Difference(float((mine - other).sum() / max(count.sum(), 1)), float(drawn.std()) if len(drawn) else 0.0)
