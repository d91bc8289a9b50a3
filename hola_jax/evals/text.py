"""Tokenizers as the evaluations see them, files of text, and what is said where either does not do."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text to numbers and back; no special tokens are added."""

    name: str
    hash: str
    vocab_size: int
    eos: int

    def encode(self, texts: list[str]) -> list[np.ndarray]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


def read_text(path: str, what: str) -> str:
    """The text of a file; `what` names its role in errors."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {path}, named as {what}")
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, named as {what}, is not UTF-8 ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise ValueError(f"{path}, named as {what}, is empty")
    return text


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_characters(tokenizer: Tokenizer, text: str, what: str) -> None:
    """Raises where the tokenizer loses a character of the text; `what` needs it. Case and composition may change."""
    missing = [character for character in sorted(set(text)) if not _kept(tokenizer, character)]
    if missing:
        more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
        shown = "".join(missing[:20])
        raise ValueError(f"the tokenizer {tokenizer.name} has no tokens for {shown!r}{more}, which {what} needs")


def _kept(tokenizer: Tokenizer, character: str) -> bool:
    between = f"a{character}a" if character.isspace() else character
    found = tokenizer.decode(tokenizer.encode([between])[0].tolist())
    return _plain(between) in _plain(found)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKD", text).casefold()
