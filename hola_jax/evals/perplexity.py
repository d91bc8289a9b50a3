"""Perplexity of text, counted as the lm-eval package counts its `wikitext`; and LAMBADA's last words."""

from __future__ import annotations

import json
import math
import re
from typing import NamedTuple

import numpy as np

from hola_jax.evals.scorer import Done, Scorer
from hola_jax.evals.text import Tokenizer, read_text

TITLE = re.compile(r"^ = [^=\n](?:.*[^=\n])? = ?$", re.MULTILINE)
# What the WikiText corpus did to its text, undone: the rules of lm-eval's `wikitext`, in their order.
_LITERAL = (
    *((f" @{mark}@ ", mark) for mark in tuple("-,.")),
    *((f" {mark} ", f"{mark} ") for mark in tuple(":;.!?,")),
)
_BRACKETS = ("()", "[]", "{}", '""', "''")
_LAST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


class Windows(NamedTuple):
    """A text's tokens as rows; the last `counted` tokens of each are predicted, and each token of the text once."""

    rows: list[np.ndarray]
    counted: list[int]


def pages(text: str) -> list[str]:
    """The articles of a WikiText file, each from its title; a text without titles is one page."""
    starts = [match.start() for match in TITLE.finditer(text)]
    cut = [text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True)]
    return [page for page in cut if page.strip()]


def detokenised(page: str) -> str:
    """Running text, as lm-eval makes it of a WikiText page."""
    page = re.sub(r"/' [0-9]/", "/'[0-9]/", page.replace("s '", "s'"))
    for old, new in _LITERAL:
        page = page.replace(old, new)
    for left, right in map(tuple, _BRACKETS):
        opening, closing = re.escape(left), re.escape(right)
        page = re.sub(rf"{opening}\s*([^{closing}]*?)\s*{closing}", rf"{left}\1{right}", page)
    for old, new in _LAST:
        page = page.replace(old, new)
    return page


def windows(tokens: np.ndarray, prefix: int, length: int) -> Windows:
    """Rows that predict at most `length` tokens each: the first begins with `prefix`, the others with the token before
    them. The last one reaches back to be as long as the others, which gives its tokens more to go by (as in lm-eval)."""
    whole = np.concatenate([[prefix], tokens]).astype(np.int32)
    rows, counted = [], []
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        rows.append(whole[start if start == 0 else end - length : end + 1])
        counted.append(end - start)
    return Windows(rows, counted)


def log_likelihoods(scorer: Scorer, texts: list[Windows], done: Done) -> list[float]:
    """Of each text, in nats."""
    scored = iter(scorer.loglikelihood([row for text in texts for row in text.rows], done))
    return [sum(float(next(scored).logprob[-count:].sum(dtype=np.float64)) for count in text.counted) for text in texts]


def perplexities(log_likelihood: float, *, words: int, tokens: int, size: int) -> dict[str, float]:
    """By word, by token and by byte of text."""
    return {
        "word_perplexity": _perplexity(log_likelihood, words),
        "token_perplexity": _perplexity(log_likelihood, tokens),
        "byte_perplexity": _perplexity(log_likelihood, size),
        "bits_per_byte": -log_likelihood / size / math.log(2),
    }


def _perplexity(log_likelihood: float, count: int) -> float:
    return math.exp(min(-log_likelihood / count, 700.0))


def word_count(page: str) -> int:
    """Of the original page, what stands before its first blank and behind its last included, as lm-eval counts."""
    return len(re.split(r"\s+", page))


def passages(path: str) -> list[tuple[str, str]]:
    """(context, " " and the last word) of each passage of a LAMBADA file: JSON lines with "text", or a passage a line."""
    found = []
    for number, line in enumerate(read_text(path, "lambada").splitlines(), 1):
        if not line.strip():
            continue
        text = _passage(line, f"line {number} of {path}").strip()
        context, blank, last = text.rpartition(" ")
        if not blank:
            raise ValueError(f"line {number} of {path} has one word; a passage is a context and a last word")
        found.append((context, " " + last))
    return found


def _passage(line: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError) as error:
        raise ValueError(f'{where} is no JSON object with "text"') from error
    return str(text)


def encoded_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[np.ndarray, int]:
    """(tokens of both, how many of them are the continuation's), cut where the context's own tokens end."""
    both, first = tokenizer.encode([context + continuation, context])
    if len(both) <= len(first):
        raise ValueError(
            f"the tokenizer {tokenizer.name} gives {continuation!r} no tokens behind {context[-40:]!r}; it cannot be scored"
        )
    return both.astype(np.int32), len(both) - len(first)
