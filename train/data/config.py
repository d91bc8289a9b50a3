"""What a run may train on, as plain values: a source says where the tokens come from and opens nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Split = Literal["train", "held_out"]


@dataclasses.dataclass(frozen=True)
class LibraryText:
    """The standard library's own source: every machine with Python has it."""

    tokenizer: str = "bytes"
    """`bytes`, `mistral-v1`, or the path of a tokenizers JSON."""


@dataclasses.dataclass(frozen=True)
class TextFolder:
    """A folder of text files, tokenised at start and kept in memory; a tenth of the files, by their names, is held out."""

    path: str
    """The folder."""
    tokenizer: str = "bytes"
    """`bytes`, `mistral-v1`, or the path of a tokenizers JSON."""
    pattern: str = "**/*.txt"
    """Which files of the folder, as a glob."""
    held_out: float = 0.1
    """Share of the files that is held out; the same files whatever else the folder holds."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class Records:
    """A folder that `hola prepare` made: ArrayRecord shards and manifest.json."""

    path: str
    """The folder, on a file system that every process sees."""
    tokenizer: str | None = None
    """The tokenizer it must have been made with: a name, a path or a sha256. None takes what the manifest names."""
    check: Literal["auto", "size", "full"] = "auto"
    """At start: sizes and footers of all shards ("size"), checksums too ("full"), or full up to 1 GiB ("auto")."""


Text = LibraryText | TextFolder | Records


@dataclasses.dataclass(frozen=True)
class Facts:
    """Rows made on the fly without end: facts stand among noise, and in the last quarter some are asked for again.

    A fact is a key and behind it its value, two tokens of their own; a question is the key once more. What counts is the
    value that is answered.
    """

    most: int = 12
    """Facts of a row at most."""
    fewest: int = 1
    """And at least: rows with few are what a model learns from first."""
    asked: int = 8
    """Questions of a row, each for another fact; fewer where there are fewer facts."""
    told: tuple[float, float] = (0.0, 0.75)
    """Between which shares of a row the facts stand."""
    kinds: int = 64
    """How many keys there are, how many values, and how many tokens of noise where `noise` is None."""
    noise: Text | None = None
    """The text among which the facts stand: its tokens come first, keys and values behind them. None draws it at random."""
    answers_count: int | None = None
    """So many times what a token of that text does, which then counts too. None: answers alone count."""
    corrected: float = 0.0
    """Share of a row's facts that are told once more, later and with another value, which is then the answer."""

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.most <= self.kinds:
            raise ValueError(
                f"Facts has fewest={self.fewest}, most={self.most}, kinds={self.kinds}; they must be 1 <= fewest <= most <= "
                "kinds"
            )
        if self.asked < 1:
            raise ValueError(f"Facts.asked is {self.asked}; it must be at least 1")
        if not 0 <= self.told[0] < self.told[1] <= 0.75:
            raise ValueError(f"Facts.told is {self.told}; it must be two shares from 0 to 0.75, the smaller first")
        if self.answers_count is not None:
            if self.noise is None:
                raise ValueError("Facts.answers_count is of a text, and noise is None: random tokens teach nothing")
            if not 1 <= self.answers_count <= 255:
                raise ValueError(f"Facts.answers_count is {self.answers_count}; it must be None or from 1 to 255")
        if not 0 <= self.corrected <= 1 or (self.corrected and self.kinds < 2):
            raise ValueError(
                f"Facts.corrected is {self.corrected} with kinds={self.kinds}; it must be a share from 0 to 1, and above 0 "
                "there must be two values to choose from"
            )


Part = Text | Facts


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Rows of several sources, interleaved by weight."""

    parts: tuple[tuple[float, Part], ...]
    """(weight, source): weights need not sum to one."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a Mixture has no parts; give at least one (weight, source)")
        for weight, part in self.parts:
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"a Mixture gives {part} the weight {weight}; weights are above 0")
            if isinstance(part, Mixture):
                raise ValueError("a Mixture is a part of a Mixture; list its parts in the outer one instead")


Source = Part | Mixture
