"""From `ruler/s_niah_1@2k,4k` to samples, and from samples and a model to scores.

All that can be wrong with a task (its name, a length, a file, the tokenizer) is said when its samples are made, which takes
no model.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hola_jax.evals import perplexity, probes, ruler
from hola_jax.evals.haystack import Essay
from hola_jax.evals.samples import Sample, stored
from hola_jax.evals.scorer import Done, Scorer
from hola_jax.evals.text import Tokenizer, check_characters, read_text, sha256
from hola_jax.evals.words import word_lists

K = 1024
RULER = tuple(f"ruler/{name}" for name in ruler.TASKS)
TOLD = ("far_needle", *(f"recall/{facts}" for facts in probes.FACTS), "overwrite")
GROUPS = {"ruler": RULER, "recall": TOLD[1:-1]}
OF_FILES = ("wikitext", "lambada")
NAMES = (*RULER, "passkey", *TOLD, "mqar", *OF_FILES)
DEFAULT_LENGTHS = {"passkey": (2 * K,), "far_needle": (4 * K,), "overwrite": (2 * K,), "mqar": (64, 128, 256, 512, K)}
DEFAULT_LENGTHS |= dict.fromkeys(RULER, (2 * K, 4 * K, 8 * K)) | dict.fromkeys(GROUPS["recall"], (2 * K,))


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One task of a command line."""

    task: str
    lengths: tuple[int, ...] = ()
    file: str | None = None
    pairs: int | None = None
    """Of MQAR; None is a quarter of the length, the most there can be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What the samples of all tasks are made with.

    prefix      the token before the first of a text
    window      tokens that are predicted in a row where a text is longer
    vocab_size  of the model; longest: tokens it can hold, None for any number
    haystack    the text that needles are hidden in; the probes hide theirs in noise where it is None
    cache       folder of samples; None keeps none
    """

    tokenizer: Tokenizer
    prefix: int
    window: int
    vocab_size: int
    longest: int | None = None
    samples: int = 100
    seed: int = 42
    haystack: str | None = None
    cache: Path | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """The scores of a cell, by name."""

    metrics: dict[str, float]
    depths: tuple[tuple[float, float], ...] = ()
    """(depth, score) of each answer."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A task at one length, its samples made."""

    task: str
    length: int | None
    rows: int
    """That the model is given; progress counts them."""
    about: dict[str, Any]
    """What the score depends on besides task, length and model."""
    measure: Callable[[Scorer, Done], Measured]

    @property
    def name(self) -> str:
        return self.task if self.length is None else f"{self.task}@{shown_length(self.length)}"


def shown_length(length: int) -> str:
    return f"{length // K}k" if length % K == 0 else str(length)


def parse(text: str) -> list[Wanted]:
    """The tasks that `ruler/vt@2k,4k`, `mqar/4@64`, `recall`, `wikitext=FILE` or the like name."""
    name, equals, file = text.partition("=")
    name, at, lengths = name.partition("@")
    task, pairs = name, None
    if name.startswith("mqar/"):
        task, pairs = "mqar", _pairs(text, name.removeprefix("mqar/"))
    names = GROUPS.get(task, (task,))
    if names[0] not in NAMES:
        raise ValueError(_unknown(task))
    if bool(equals) != (task in OF_FILES) or (equals and (at or not file)):
        form = f"{task}=FILE" if task in OF_FILES else f"{name}@LENGTH,LENGTH, without a file"
        raise ValueError(f"{text!r} is no task; write {form}")
    if equals:
        return [Wanted(task, file=file)]
    found = tuple(_length(text, part) for part in lengths.split(",")) if at else None
    return [Wanted(name, found or DEFAULT_LENGTHS[name], pairs=pairs) for name in names]


def _unknown(task: str) -> str:
    known = [*NAMES, *GROUPS]
    near = difflib.get_close_matches(task, known, n=1) or difflib.get_close_matches(f"ruler/{task}", known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no task {task!r}; {hint}There are {', '.join(known)}"


def _pairs(text: str, given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{text!r} is no task; write mqar/PAIRS@LENGTH, such as mqar/16@256")
    return int(given)


def _length(text: str, given: str) -> int:
    match = re.fullmatch(r"(\d+)(k?)", given.strip().lower())
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{given!r} in {text!r} is no length; write tokens, such as 512, 2k or 32k")
    return int(match[1]) * (K if match[2] else 1)


def prepare(tasks: list[str], setting: Setting, done: Callable[[str], None] = lambda name: None) -> list[Cell]:
    """Cells with their samples, from the cache or made now; `done` is told the name of each."""
    if setting.samples < 1:
        raise ValueError(f"samples is {setting.samples}; it must be at least 1")
    if setting.window < 1:
        raise ValueError(f"window is {setting.window}; it must be at least 1")
    wanted = [each for text in tasks for each in parse(text)]
    if not wanted:
        raise ValueError(f"no task is named; there are {', '.join((*NAMES, *GROUPS))}")
    essay = None if setting.haystack is None else Essay.read(setting.haystack)
    _check(wanted, setting, essay)
    cells = []
    for each in wanted:
        for length in each.lengths or (None,):
            cells.append(_cell(each, length, setting, essay))
            done(cells[-1].name)
    return cells


def _check(wanted: list[Wanted], setting: Setting, essay: Essay | None) -> None:
    """Raises for what can be known before any sample is made."""
    tokenizer = setting.tokenizer
    for each in wanted:
        of_text = each.task != "mqar"
        needed = tokenizer.vocab_size if of_text else probes.MQAR_VOCABULARY
        if needed > setting.vocab_size:
            what = f"the tokenizer {tokenizer.name} has" if of_text else "mqar has"
            raise ValueError(
                f"{what} {needed} tokens, and the model's vocabulary {setting.vocab_size}; they do not fit"
            )
        longest = max([*each.lengths, setting.window] if each.file else each.lengths)
        if setting.longest is not None and longest > setting.longest:
            raise ValueError(
                f"{each.task} asks for {longest} tokens, and the model holds {setting.longest} (max_length)"
            )
        if each.file is not None:
            read_text(each.file, each.task)
        elif of_text:
            check_characters(tokenizer, ruler.CHARACTERS if each.task == "ruler/vt" else probes.CHARACTERS, each.task)
        name = each.task.removeprefix("ruler/")
        if each.task in RULER and ruler.needs_essay(name) and essay is None:
            raise ValueError(f"{each.task} hides its needles in a text; name one with --haystack FILE")
        if each.task in TOLD or (each.task in RULER and ruler.needs_words(name)):
            word_lists()


def _cell(wanted: Wanted, length: int | None, setting: Setting, essay: Essay | None) -> Cell:
    if length is None:
        return _wikitext(wanted, setting) if wanted.task == "wikitext" else _lambada(wanted, setting)
    if wanted.task == "mqar":
        return _mqar(wanted, length, setting)
    task, tokenizer = wanted.task, setting.tokenizer
    common: dict[str, Any] = {
        "length": length,
        "samples": setting.samples,
        "seed": setting.seed,
        "tokenizer": tokenizer,
    }
    name = task.removeprefix("ruler/")
    uses_essay = task in TOLD or (task in RULER and ruler.needs_essay(name))
    text = essay if uses_essay else None
    if task in RULER:
        make = partial(ruler.make, name, **common, essay=text)
    elif task == "passkey":
        make = partial(probes.passkey, **common)
    else:
        make = partial(probes.told, task, **common, essay=text)
    about = {"samples": setting.samples, "seed": setting.seed, "tokenizer": tokenizer.hash}
    if uses_essay:
        about["haystack"] = "noise" if text is None else {"file": text.name, "sha256": text.hash}
    kept = {"task": task, "length": length, **about, "haystack": None if text is None else text.hash}
    samples = stored(setting.cache, kept, make)
    if task in TOLD:
        rows = len(samples) * (1 + (task == "overwrite"))
        return Cell(task, length, rows, about, partial(_measure_told, samples, tokenizer))
    tokens, score = (probes.PASSKEY_TOKENS, _is_key) if task == "passkey" else (ruler.generated(name), _contained)
    measure = partial(_measure_generated, samples, tokenizer, length, tokens, score)
    return Cell(task, length, len(samples), about, measure)


Score = Callable[[str, str], bool]  # (generated, reference)


def _contained(text: str, reference: str) -> bool:
    return reference.lower() in text.lower()


def _is_key(text: str, reference: str) -> bool:
    return probes.first_integer(text) == reference


def _measure_generated(
    samples: list[Sample], tokenizer: Tokenizer, length: int, tokens: int, score: Score, scorer: Scorer, done: Done
) -> Measured:
    prompts = tokenizer.encode([sample.prompt for sample in samples])
    for number, prompt in enumerate(prompts):
        if len(prompt) + tokens > length:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; with {tokens} generated it does not fit in {length}"
            )
    ended = lambda _, generated: bool((generated == tokenizer.eos).any())  # noqa: E731
    found = scorer.greedy(prompts, tokens, ended, done)
    scores = []
    for sample, generated in zip(samples, found, strict=True):
        text = until_end(generated, tokenizer)
        scores.append([float(score(text, reference)) for reference in sample.references])
    depths = [
        (depth, value)
        for sample, values in zip(samples, scores, strict=True)
        for depth, value in zip(sample.depths, values, strict=True)
    ]
    return Measured({"accuracy": _mean([_mean(values) for values in scores])}, tuple(depths))


def until_end(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text before the end of the document."""
    ends = np.flatnonzero(tokens == tokenizer.eos)
    return tokenizer.decode(tokens[: ends[0] if len(ends) else None].tolist())


def _measure_told(samples: list[Sample], tokenizer: Tokenizer, scorer: Scorer, done: Done) -> Measured:
    pairs = [perplexity.encoded_pair(tokenizer, s.prompt, " " + s.references[0]) for s in samples]
    stale = [perplexity.encoded_pair(tokenizer, s.prompt, " " + s.stale) for s in samples if s.stale is not None]
    scored = scorer.loglikelihood([row for row, _ in [*pairs, *stale]], done)
    hits = [found.greedy[-count:] for found, (_, count) in zip(scored, pairs, strict=False)]
    accuracies = [float(hit.mean()) for hit in hits]
    metrics = {"accuracy": _mean(np.concatenate(hits).tolist()), "exact": _mean([float(hit.all()) for hit in hits])}
    if stale:
        logprobs = [found.logprob[-count:].sum() for found, (_, count) in zip(scored, [*pairs, *stale], strict=True)]
        latest, old = logprobs[: len(pairs)], logprobs[len(pairs) :]
        metrics["prefers_stale"] = _mean([float(b > a) for a, b in zip(latest, old, strict=True)])
    return Measured(metrics, tuple(zip([s.depths[0] for s in samples], accuracies, strict=True)))


def _mqar(wanted: Wanted, length: int, setting: Setting) -> Cell:
    pairs = length // 4 if wanted.pairs is None else wanted.pairs
    queries = probes.mqar(length=length, pairs=pairs, samples=setting.samples, seed=setting.seed)

    def measure(scorer: Scorer, done: Done) -> Measured:
        scored = scorer.loglikelihood(list(queries.tokens), done)
        hits = np.stack([found.greedy for found in scored])
        asked = queries.asked[:, :-1]
        answers = hits[asked].astype(float)
        depths = tuple(zip(queries.depths[:, :-1][asked].tolist(), answers.tolist(), strict=True))
        return Measured({"accuracy": float(answers.mean())}, depths)

    about = {"samples": setting.samples, "seed": setting.seed, "pairs": pairs}
    return Cell(f"mqar/{pairs}", length, setting.samples, about, measure)


def _wikitext(wanted: Wanted, setting: Setting) -> Cell:
    assert wanted.file is not None
    text = read_text(wanted.file, "wikitext")
    check_characters(setting.tokenizer, text, f"{wanted.file}")
    pages = perplexity.pages(text)
    tokens = setting.tokenizer.encode([perplexity.detokenised(page) for page in pages])
    texts = [perplexity.windows(each, setting.prefix, setting.window) for each in tokens]
    counts = {
        "words": sum(map(perplexity.word_count, pages)),
        "tokens": sum(map(len, tokens)),
        "size": sum(len(page.encode()) for page in pages),
    }

    def measure(scorer: Scorer, done: Done) -> Measured:
        return Measured(perplexity.perplexities(sum(perplexity.log_likelihoods(scorer, texts, done)), **counts))

    about = {"file": wanted.file, "sha256": sha256(text), "pages": len(pages), "window": setting.window, **counts}
    about |= {"prefix": setting.prefix, "tokenizer": setting.tokenizer.hash}
    return Cell("wikitext", None, sum(len(each.rows) for each in texts), about, measure)


def _lambada(wanted: Wanted, setting: Setting) -> Cell:
    assert wanted.file is not None
    tokenizer, passages = setting.tokenizer, perplexity.passages(wanted.file)
    text = "".join(context + last for context, last in passages)
    check_characters(tokenizer, text, wanted.file)
    pairs = [perplexity.encoded_pair(tokenizer, context, last) for context, last in passages]

    def measure(scorer: Scorer, done: Done) -> Measured:
        scored = scorer.loglikelihood([_begun(row, count, setting.prefix) for row, count in pairs], done)
        logprobs = [float(found.logprob[-count:].sum()) for found, (_, count) in zip(scored, pairs, strict=True)]
        right = [float(found.greedy[-count:].all()) for found, (_, count) in zip(scored, pairs, strict=True)]
        return Measured({"accuracy": _mean(right), "perplexity": math.exp(min(-_mean(logprobs), 700.0))})

    about = {"file": wanted.file, "sha256": sha256(text), "passages": len(pairs), "tokenizer": tokenizer.hash}
    return Cell("lambada", None, len(pairs), about, measure)


def _begun(row: np.ndarray, counted: int, prefix: int) -> np.ndarray:
    """The row with `prefix` before it where all of it is predicted."""
    return row if counted < len(row) else np.concatenate([[prefix], row]).astype(np.int32)


def _mean(values: list[float]) -> float:
    return float(np.mean(values))
