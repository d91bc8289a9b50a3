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

    Tokens: noise below `first`, behind it `kinds` keys and `kinds` values. The mask tells what the token behind one
    counts: answers, and where `answers_count` is given the tokens of the text.
    """

    def __init__(self, task: Facts, row: int, seed: int, first: int, noise: Any = None) -> None:
        self.task, self.row, self.seed, self.first, self.noise = task, row, seed, first, noise
        begin, end = (int(share * row / 2) for share in task.told)
        self.told, self.asked = np.arange(begin, end) * 2, np.arange(int(row * ASKED_FROM / 2), row // 2) * 2
        facts, questions = task.most + self._twice(task.most), min(task.asked, task.most)
        if facts > len(self.told) or questions > len(self.asked):
            raise ValueError(
                f"rows of {row} tokens have room for {len(self.told)} facts and {len(self.asked)} questions, and "
                f"{facts} and {questions} are wanted; use longer rows, or fewer of them"
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
        twice = self._twice(facts)
        places = np.sort(draw.choice(self.told, facts + twice, replace=False))
        again = draw.permutation(facts)[: task.asked]
        questions = np.sort(draw.choice(self.asked, len(again), replace=False))
        tokens[places], tokens[places + 1] = self._told(draw, keys, values, twice)
        tokens[questions], tokens[questions + 1] = keys[again], values[again]
        mask = np.zeros(self.row + 1, np.uint8)
        if task.answers_count is not None:
            mask[:-1] = tokens[1:] < self.first
        mask[questions] = task.answers_count or 1
        return {"tokens": tokens.astype(np.int32), "segment_ids": np.ones(self.row + 1, np.int32), "mask": mask}

    def _twice(self, facts: int) -> int:
        """How many of so many facts are told twice."""
        return round(self.task.corrected * facts)

    def _told(
        self, draw: np.random.Generator, keys: np.ndarray, values: np.ndarray, twice: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values in the order in which they are told; the first `twice` facts with another value before."""
        if not twice:
            return keys, values
        order = draw.permutation(np.append(np.arange(len(keys)), np.arange(twice)))
        told, first = values[order], np.unique(order, return_index=True)[1][:twice]
        behind = self.first + self.task.kinds
        told[first] = (
            behind + (values[:twice] - behind + draw.integers(1, self.task.kinds, size=twice)) % self.task.kinds
        )
        return keys[order], told
