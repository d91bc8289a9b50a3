"""What the demo trains on: text that every machine with Python has, and a recall task made on the spot."""

from __future__ import annotations

import sysconfig
import zlib
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


def library_text(tokens: int, root: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(train, held out): rows of `tokens` bytes, each from one file, the two sets split by file."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    rows: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for path in library_files(root):
        data = np.frombuffer(path.read_bytes(), np.uint8)
        whole = len(data) // tokens
        held_out = zlib.crc32(path.relative_to(root).as_posix().encode()) % HELD_OUT == 0
        rows[held_out].extend(data[: whole * tokens].reshape(whole, tokens))
    for held_out, found in rows.items():
        if not found:
            kind = "held-out" if held_out else "training"
            raise ValueError(
                f"the source files below {root} give no {kind} row of {tokens} bytes; ask for shorter rows"
            )
    return np.stack(rows[False]), np.stack(rows[True])


class Recall:
    """Facts planted among noise, asked for at the end: an exact memory's task.

    A sequence of 64 tokens: 6 pairs (key, value) at random places of the first 48, noise between them; then 4 questions of
    4 tokens, noise, noise, key, value. Keys, values and noise are 32 tokens each. What counts is the value, predicted at
    its key.
    """

    tokens, pairs, questions, kind = 64, 6, 4, 32
    vocab_size = 3 * kind

    def batch(self, draw: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [rows, T], mask [rows, T] of the tokens whose successor is an answer)."""
        story = self.tokens - 4 * self.questions
        tokens = 2 * self.kind + draw.integers(self.kind, size=(rows, self.tokens))
        mask = np.zeros((rows, self.tokens), bool)
        for row in range(rows):
            keys = draw.permutation(self.kind)[: self.pairs]
            values = self.kind + draw.integers(self.kind, size=self.pairs)
            places = 2 * draw.permutation(story // 2)[: self.pairs]
            tokens[row, places], tokens[row, places + 1] = keys, values
            asked = draw.permutation(self.pairs)[: self.questions]
            at = story + 4 * np.arange(self.questions) + 2
            tokens[row, at], tokens[row, at + 1] = keys[asked], values[asked]
            mask[row, at] = True
        return tokens.astype(np.int32), mask
