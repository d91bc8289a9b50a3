"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

BROKEN = "\ufffd"  # what decoders put for bytes that are no character (yet)
MOST_BROKEN = 32  # behind so many the text does not wait for a character any longer
CONTEXT = 8  # tokens of the prompt that are decoded along: some tokenizers strip the space of a first word


class Tokenizer(Protocol):
    """What generation needs of a tokenizer; those of `train.data.tokenizers` are such."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos(self) -> int: ...

    def encode(self, texts: list[str]) -> list[np.ndarray]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


class TextStream:
    """The text of one row. `take` gives what can be shown for good; `finish` the rest."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.context = list(prompt[-CONTEXT:])  # shown already; decoded along for what depends on neighbours
        self.before = len(tokenizer.decode(self.context))  # characters of the context, and of what is shown behind it
        self.tokens: list[int] = []  # not all shown yet
        self.held = ""  # whole characters that may begin a stop string
        self.stopped = False

    def take(self, token: int) -> str:
        """What one more token makes sure of; sets `stopped` when a stop string is complete."""
        self.tokens.append(token)
        text = self.tokenizer.decode([*self.context, *self.tokens])
        whole = text.rstrip(BROKEN)
        if len(text) - len(whole) > MOST_BROKEN:
            whole = text[:-3]  # an unfinished character is at most three bytes
        new, whole_now = whole[self.before :], len(whole) == len(text)
        self.before = max(self.before, len(whole))
        if whole_now and new:  # a clean cut: what comes later is decoded beside these tokens alone
            self.context, self.tokens = self.tokens, []
            self.before = len(self.tokenizer.decode(self.context))
        return self._show(new)

    def finish(self) -> str:
        """The rest, when no token comes any more."""
        if self.stopped:
            return ""
        text = self.tokenizer.decode([*self.context, *self.tokens]) if self.tokens else ""
        shown = self._show(text[self.before :])
        rest, self.held = self.held, ""
        return shown if self.stopped else shown + rest

    def _show(self, new: str) -> str:
        text = self.held + new
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        cut = len(text) - keep
        self.held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
