"""RULER's retrieval and tracing tasks (Hsieh et al. 2024), nine of them, at any length.

Greedy continuation, scored by the mean over the references of whether each is contained in it, whatever the case.
"""

from __future__ import annotations

import dataclasses
import string
from itertools import pairwise
from random import Random
from typing import Literal

from hola_jax.evals.haystack import DEPTHS, NOISE, Build, Essay, depth_of, fill, into_lines, into_sentences
from hola_jax.evals.samples import Sample
from hola_jax.evals.text import Tokenizer
from hola_jax.evals.words import Kind, draw, draw_distinct

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided text? The "
    "special magic {kind} for {query} mentioned in the provided text are"
)
TRACING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all "
    "variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of variable "
    "assignment in the text above, {count} variables are assigned the value {query}, they are: "
)
HOPS = 4
EXAMPLE = 500  # tokens of the worked example of variable tracing


@dataclasses.dataclass(frozen=True)
class Needles:
    """A needle-in-a-haystack task."""

    haystack: Literal["noise", "essay", "needle"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


TASKS: dict[str, Needles | None] = {
    "s_niah_1": Needles("noise"),
    "s_niah_2": Needles("essay"),
    "s_niah_3": Needles("essay", value="uuids"),
    "mk_niah_1": Needles("essay", keys=4),
    "mk_niah_2": Needles("needle"),
    "mk_niah_3": Needles("needle", key="uuids", value="uuids"),
    "mv_niah": Needles("essay", values=4),
    "mq_niah": Needles("essay", keys=4, queries=4),
    "vt": None,  # tracing variables
}
CHARACTERS = string.ascii_letters + string.digits + ".,:-?()= \n"


def generated(task: str) -> int:
    """Tokens that are generated."""
    return 30 if task == "vt" else 128


def needs_essay(task: str) -> bool:
    needles = TASKS[task]
    return needles is not None and needles.haystack == "essay"


def needs_words(task: str) -> bool:
    needles = TASKS[task]
    return needles is not None and needles.key == "words"


def make(
    task: str, *, length: int, samples: int, seed: int, tokenizer: Tokenizer, essay: Essay | None = None
) -> list[Sample]:
    """Samples whose prompt and generated tokens are at most `length` tokens together."""
    needles = TASKS[task]
    if needs_essay(task) and essay is None:
        raise ValueError(f"ruler/{task} hides its needles in a text; name one with --haystack FILE")
    build = _tracing(tokenizer, seed) if needles is None else _retrieval(needles, seed, essay)
    return fill(
        build,
        tokenizer,
        task=f"ruler/{task}",
        room=length - generated(task),
        seed=seed,
        samples=samples,
        essay=essay if needs_essay(task) else None,
    )


def template(single: bool) -> str:
    """The prompt's words for one answer, or for several."""
    if not single:
        return TEMPLATE
    return TEMPLATE.replace("Some", "A").replace("are all", "is").replace("are", "is")


def listed(names: list[str]) -> str:
    """ "a", or "a, b, c, and d"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


def _retrieval(task: Needles, seed: int, essay: Essay | None) -> Build:
    def build(units: int, random: Random) -> Sample:
        keys = draw_distinct(task.key, task.keys, random)
        values = {key: draw_distinct(task.value, task.values, random) for key in keys}
        needles = [_needle(task, key, value) for key in keys for value in values[key]]
        Random(seed).shuffle(needles)  # the same order in every sample
        context = _context(task, needles, units, random, essay)
        asked = random.sample(keys, task.queries)
        single = task.queries * task.values == 1
        prompt = template(single).format(
            kind=task.value.removesuffix("s") if single else task.value, context=context, query=listed(asked)
        )
        answers = [(key, value) for key in asked for value in values[key]]
        depths = tuple(depth_of(_needle(task, key, value), context) for key, value in answers)
        return Sample(prompt, tuple(value for _, value in answers), depths)

    return build


def _needle(task: Needles, key: str, value: str) -> str:
    return NEEDLE.format(kind=task.value, key=key, value=value)


def _context(task: Needles, needles: list[str], units: int, random: Random, essay: Essay | None) -> str:
    if task.haystack == "essay":
        assert essay is not None
        return into_sentences(essay.sentences(units), needles, sorted(random.sample(DEPTHS, len(needles))))
    if task.haystack == "noise":
        return into_lines([NOISE] * units, needles, random)
    others = [_needle(task, draw(task.key, random), draw(task.value, random)) for _ in range(units)]
    return into_lines(others, needles, random)


def _tracing(tokenizer: Tokenizer, seed: int) -> Build:
    example = _example(tokenizer, seed)

    def build(units: int, random: Random) -> Sample:
        sample = _traced(units, random, 5)
        return Sample(example + sample.prompt, sample.references, sample.depths)

    return build


def _example(tokenizer: Tokenizer, seed: int) -> str:
    """One question with its answer, about `EXAMPLE` tokens long: never fewer lines of noise than assignments."""

    def text(units: int) -> str:
        sample = _traced(units, Random(f"{seed} example"), 3)
        return f"{sample.prompt}{' '.join(sample.references)}\n\n"

    units = HOPS + 1
    while len(tokenizer.encode([text(units + 1)])[0]) <= EXAMPLE:
        units += 1
    return text(units)


def _traced(units: int, random: Random, letters: int) -> Sample:
    """A chain of assignments among noise."""
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(random.choices(string.ascii_uppercase, k=letters))] = None
    chain = list(names)
    value = str(random.randint(10000, 99999))
    lines = [f"VAR {chain[0]} = {value}"] + [f"VAR {new} = VAR {old} " for old, new in pairwise(chain)]
    context = into_lines([NOISE] * units, lines, random)
    prompt = TRACING.format(context=context, query=value, count=len(chain))
    return Sample(prompt, tuple(chain), tuple(depth_of(line, context) for line in lines))
