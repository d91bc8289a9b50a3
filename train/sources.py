"""Sources that need nothing: text that every machine with Python has, and a recall task made on the spot."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np

HELD_OUT = 10  # one file in so many
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings", "__pycache__"}


def library_files(root: Path | None = None) -> list[Path]:
    """The standard library's own source files, in the order of their names, without its tests and tables."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(root).parts)]
    if not files:
        raise FileNotFoundError(
            f"{root} holds no .py files: this Python came without the source of its standard library"
        )
    return files


class Recall:
    """Facts planted at the start, asked for until the end: an exact memory's task.

    A row of 64 tokens is 32 pairs (key, value), both out of 16 symbols of their own. Its first pairs plant facts, each key
    once with a value at random; every later pair asks one of them again. What counts is the value of a question, predicted
    at its key. Training mixes rows of 2 to 8 facts, for without the easy ones the hard ones are not learned in minutes; 8
    are what is measured.
    """

    tokens, pairs, kind = 64, 8, 16
    vocab_size = 2 * kind

    def batch(self, draw: np.random.Generator, rows: int, fewest: int = 2) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [rows, T], mask [rows, T] of the tokens whose successor is an answer), `fewest` to 8 facts a row."""
        tokens = np.empty((rows, self.tokens), np.int32)
        mask = np.zeros((rows, self.tokens), bool)
        for row in range(rows):
            facts = int(draw.integers(fewest, self.pairs + 1))
            keys = draw.permutation(self.kind)[:facts]
            values = self.kind + draw.integers(self.kind, size=facts)
            told = np.concatenate([np.arange(facts), draw.integers(facts, size=self.tokens // 2 - facts)])
            tokens[row, 0::2], tokens[row, 1::2] = keys[told], values[told]
            mask[row, 2 * facts :: 2] = True
        return tokens, mask
