"""Facts among noise: a task whose answers only a memory has, made from (seed, number) without end."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from train.data.config import Facts

Row = dict[str, np.ndarray]
ASKED_FROM = 0.75  # of a row: from there on the questions stand


class FactRows:
    """rows[i] of the task. `noise` gives rows of text to hide the facts in; without it noise is made up.

    Tokens: noise below `first`, behind it `kinds` keys and `kinds` values. The mask marks the keys that ask.
    """

    def __init__(self, task: Facts, row: int, seed: int, first: int, noise: Any = None) -> None:
        self.task, self.row, self.seed, self.first, self.noise = task, row, seed, first, noise
        begin, end = (int(share * row / 2) for share in task.told)
        self.told, self.asked = np.arange(begin, end) * 2, np.arange(int(row * ASKED_FROM / 2), row // 2) * 2
        questions = min(task.asked, task.most)
        if task.most > len(self.told) or questions > len(self.asked):
            raise ValueError(
                f"rows of {row} tokens have room for {len(self.told)} facts and {len(self.asked)} questions, and "
                f"{task.most} and {questions} are wanted; use longer rows, or fewer of them"
            )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Row:
        task, draw = self.task, np.random.default_rng((self.seed, int(index)))
        if self.noise is None:
            tokens = draw.integers(self.first, size=self.row + 1)
        else:
            tokens = self.noise[int(index)]["tokens"].copy()
        facts = int(draw.integers(task.fewest, task.most + 1))
        keys = self.first + draw.choice(task.kinds, facts, replace=False)
        values = self.first + task.kinds + draw.integers(task.kinds, size=facts)
        places = np.sort(draw.choice(self.told, facts, replace=False))
        again = draw.permutation(facts)[: task.asked]
        questions = np.sort(draw.choice(self.asked, len(again), replace=False))
        tokens[places], tokens[places + 1] = keys, values
        tokens[questions], tokens[questions + 1] = keys[again], values[again]
        mask = np.zeros(self.row + 1, bool)
        mask[questions] = True
        return {"tokens": tokens.astype(np.int32), "segment_ids": np.ones(self.row + 1, np.int32), "mask": mask}
