"""Recall probes: the passkey, the far needle, one of many keys, a key that was written over, and MQAR.

All but the passkey are scored on given answers: the share of the answers' tokens that the model finds likeliest
("accuracy"), and of answers of which it finds all ("exact").
"""

from __future__ import annotations

import re
import string
from random import Random
from typing import NamedTuple

import numpy as np

from hola_jax.evals.haystack import NOISE, Build, Essay, depth_of, fill, into_lines, into_sentences
from hola_jax.evals.ruler import NEEDLE, template
from hola_jax.evals.samples import Sample
from hola_jax.evals.text import Tokenizer
from hola_jax.evals.words import draw, draw_distinct

PASSKEY_TOKENS = 10
PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about "
    "the important information there.",
    "The pass key is {key}. Remember it. {key} is the pass key.",
    "What is the pass key? The pass key is",
)
FAR = 10  # depth of the far needle, in hundredths
REWRITTEN = 4  # keys that are written twice
UPDATE = "The special magic number for {key} is now: {value}."
LATEST = (
    "Special magic numbers are hidden within the following text, and some are changed later in it. Make sure to memorize "
    "the latest ones.\n{context}\nWhat is the latest special magic number for {key} mentioned in the provided text? The "
    "latest special magic number for {key} mentioned in the provided text is"
)
FACTS = (1, 2, 4, 8, 16)
CHARACTERS = string.ascii_letters + string.digits + ".,:-? \n"


def passkey(*, length: int, samples: int, seed: int, tokenizer: Tokenizer) -> list[Sample]:
    """A number told once amid noise; `PASSKEY_TOKENS` tokens are generated (Mohtashami & Jaggi 2023)."""

    def build(units: int, random: Random) -> Sample:
        key, before = str(random.randint(1, 50000)), random.randint(0, units)
        told = PASSKEY[1].format(key=key)
        context = "\n".join([" ".join([NOISE] * before), told, " ".join([NOISE] * (units - before))])
        return Sample(f"{PASSKEY[0]}\n{context}\n{PASSKEY[2]}", (key,), (depth_of(told, context),))

    return fill(build, tokenizer, task="passkey", room=length - PASSKEY_TOKENS, seed=seed, samples=samples)


def first_integer(text: str) -> str | None:
    found = re.search(r"\d+", text)
    return None if found is None else found.group()


def _hidden(
    needles: list[str], units: int, random: Random, essay: Essay | None, depths: list[int] | None = None
) -> str:
    """The needles in their order in noise or in the essay, at these depths in hundredths or at random ones."""
    if depths is None and essay is None:
        return into_lines([NOISE] * units, needles, random)
    depths = sorted(random.choices(range(101), k=len(needles))) if depths is None else depths
    sentences = tuple([NOISE] * units) if essay is None else essay.sentences(units)
    return into_sentences(sentences, needles, depths)


def _one_of(count: int, essay: Essay | None, depths: list[int] | None) -> Build:
    def build(units: int, random: Random) -> Sample:
        keys = draw_distinct("words", count, random)
        values = draw_distinct("numbers", count, random)
        needles = [NEEDLE.format(kind="numbers", key=key, value=value) for key, value in zip(keys, values, strict=True)]
        context = _hidden(needles, units, random, essay, depths)
        asked = random.randrange(count)
        prompt = template(single=True).format(kind="number", context=context, query=keys[asked])
        return Sample(prompt, (values[asked],), (depth_of(needles[asked], context),))

    return build


def _overwritten(essay: Essay | None) -> Build:
    def build(units: int, random: Random) -> Sample:
        keys = draw_distinct("words", REWRITTEN, random)
        values = draw_distinct("numbers", 2 * REWRITTEN, random)
        again = random.sample(range(REWRITTEN), REWRITTEN)
        order = [*range(REWRITTEN), *again]
        needles = [UPDATE.format(key=keys[n], value=value) for n, value in zip(order, values, strict=True)]
        context = _hidden(needles, units, random, essay)
        asked = random.randrange(REWRITTEN)
        latest = REWRITTEN + again.index(asked)
        prompt = LATEST.format(context=context, key=keys[asked])
        return Sample(prompt, (values[latest],), (depth_of(needles[latest], context),), stale=values[asked])

    return build


def told(
    task: str, *, length: int, samples: int, seed: int, tokenizer: Tokenizer, essay: Essay | None = None
) -> list[Sample]:
    """Samples of "far_needle", "recall/N" or "overwrite": prompt and answer have at most `length` tokens."""
    if task == "far_needle":
        build = _one_of(1, essay, [FAR])
    elif task == "overwrite":
        build = _overwritten(essay)
    else:
        build = _one_of(int(task.removeprefix("recall/")), essay, None)
    answer = max(len(tokens) for tokens in tokenizer.encode([" " + draw("numbers", Random(n)) for n in range(32)]))
    room = length - answer - 1  # a token may straddle the prompt's end
    return fill(build, tokenizer, task=task, room=room, seed=seed, samples=samples, essay=essay)


class Queries(NamedTuple):
    """Rows of tokens without text: at the tokens of `asked` the next token is an answer."""

    tokens: np.ndarray  # int32 [samples, length + 1]
    asked: np.ndarray  # bool [samples, length + 1]
    depths: np.ndarray  # float [samples, length + 1]: at an answer's question, where its pair was told


MQAR_VOCABULARY = 8192


def mqar(*, length: int, pairs: int, samples: int, seed: int) -> Queries:
    """Multi-query associative recall (Arora et al. 2023): all pairs first, then each key once again, its value behind it.

    Keys are 1 to 4095, values 4096 to 8191; a question's distance follows p(i) ~ i ** (0.01 - 1) over the places that are
    left; what is neither is noise out of the whole vocabulary.
    """
    space = (length - 2 * pairs) // 2
    if pairs < 1 or space < pairs:
        raise ValueError(f"mqar asks {pairs} pairs in {length} tokens; at this length 1 to {length // 4} are possible")
    weights = np.arange(1, space + 1) ** (0.01 - 1)
    tokens = np.zeros((samples, length + 1), np.int32)
    asked, depths = np.zeros(tokens.shape, bool), np.zeros(tokens.shape)
    for number in range(samples):
        draws = np.random.default_rng((seed, length, pairs, number))
        row = draws.integers(MQAR_VOCABULARY, size=length + 1)
        keys = 1 + draws.choice(MQAR_VOCABULARY // 2 - 1, pairs, replace=False)
        values = MQAR_VOCABULARY // 2 + draws.choice(MQAR_VOCABULARY // 2, pairs, replace=False)
        row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2] = keys, values
        places = 2 * pairs + 2 * draws.choice(space, pairs, replace=False, p=weights / weights.sum())
        row[places], row[places + 1] = keys, values
        tokens[number], asked[number, places] = row, True
        depths[number, places] = 2 * np.arange(pairs) / length
    return Queries(tokens, asked, depths)
