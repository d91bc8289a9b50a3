"""Keys and values of needles: adjective-noun words of the package wonderwords, numbers of seven digits, uuids."""

from __future__ import annotations

import uuid
from functools import cache
from importlib import resources
from random import Random
from typing import Literal

Kind = Literal["words", "numbers", "uuids"]


@cache
def word_lists() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(adjectives, nouns), or an ImportError that says what to install."""
    try:
        assets = resources.files("wonderwords") / "assets"
    except ImportError as error:
        raise ImportError(
            "the keys of these tasks are words of the package wonderwords: pip install 'hola-jax[evals]'",
            name=error.name,
        ) from error
    lists = [(assets / f"{name}list.txt").read_text().split("\n") for name in ("adjective", "noun")]
    adjectives, nouns = (tuple(sorted({word.strip() for word in words} - {""})) for words in lists)
    return adjectives, nouns


def draw(kind: Kind, random: Random) -> str:
    """One key or value."""
    if kind == "numbers":
        return str(random.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=random.getrandbits(128), version=4))
    return "-".join(random.choice(words) for words in word_lists())


def draw_distinct(kind: Kind, count: int, random: Random) -> list[str]:
    """So many, no two alike."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(kind, random)] = None
    return list(found)
