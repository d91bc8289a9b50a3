"""What the demo found, in words, numbers and pictures: computed, whichever way it came out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hola_jax import MemoryConfig
from hola_jax.diagnostics import charts, repetition
from hola_jax.diagnostics.repetition import Difference
from train.compare import CONTEXT, Files, Measured, Texts

Names = dict[
    str, str
]  # of the models, by the names of their run folders; "hola" is the one the others are held against

ONE_SEED = "One seed and one small size: another seed may turn what is close."


def table(measured: dict[str, Measured], names: Names, texts: Files) -> str:
    """Perplexity, and what each model knew of repetitions by their distance."""
    some = next(iter(measured.values()))
    lines = [f"{'':18}{'parameters':>10}{'perplexity':>12}{'bits/byte':>11}"]
    for key, each in measured.items():
        lines.append(f"{names[key]:18}{each.parameters:10,}{each.perplexity:12.2f}{bits_per_byte(each, texts):11.4f}")
    lines.append(f"on {some.tokens.sum():,} tokens of {len(texts.rows)} held-out files")
    for title, values in (("known", "accuracy"), ("loss", "loss")):
        lines += ["", *_by_distance(f"repeated, {title}", measured, names, texts, values)]
    return "\n".join([*lines, _asked(some, "tokens")])


def facts_table(measured: dict[str, Measured], names: Names, texts: Texts) -> str:
    """What share of the questions each model answered, by the distance to where the fact was told."""
    lines = _by_distance("facts answered", measured, names, texts, "accuracy")
    return "\n".join([*lines, _asked(next(iter(measured.values())), "questions")])


def _by_distance(heading: str, measured: dict[str, Measured], names: Names, texts: Texts, values: str) -> list[str]:
    lines = [f"{heading:18}" + "".join(f"{span:>11}" for span in texts.ranges)]
    for key, each in measured.items():
        cells = [_cell(value, values == "accuracy") for value in getattr(each, values)]
        lines.append(f"{names[key]:18}" + "".join(f"{cell:>11}" for cell in cells))
    return lines


def _asked(some: Measured, what: str) -> str:
    return f"{what:18}" + "".join(f"{int(count):11,}" for count in some.recall.asked.sum(0))


def _cell(value: float, share: bool) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}" if share else f"{value:.3f}"


def bits_per_byte(each: Measured, texts: Files) -> float:
    return float(each.nats.sum() / math.log(2) / texts.size)


def what_is_asked(texts: Files) -> str:
    """What the repetitions are."""
    count = sum(int(np.count_nonzero(far)) for far in texts.distances)
    return (
        f"{count:,} tokens of {len(texts.rows)} held-out files end {CONTEXT + 1} tokens that stood earlier in their file "
        "and nowhere in the training text: a model may guess them, a memory of the file knows them."
    )


def answered(measured: dict[str, Measured], names: Names, memory: MemoryConfig) -> list[str]:
    """Of the facts told farther back than a cache of the latest tokens sees: what each model answers."""
    far = slice(reach(memory), None)
    shares = []
    for key, each in measured.items():
        right, asked = (x[:, far].sum(1) for x in (each.recall.right, each.recall.asked))
        share = repetition.difference(right, np.zeros(len(asked)), asked)
        shares.append(f"{names[key]} {share.value:.1%} (standard error {100 * share.error:.1f})")
    visible = memory.window + memory.block
    return [f"Of facts told among text more than {visible} tokens back, answered are: {', '.join(shares)}."]


def sentences(measured: dict[str, Measured], names: Names, memory: MemoryConfig, texts: Files) -> list[str]:
    """On files, HOLA against each of the others."""
    near, far = slice(0, reach(memory)), slice(reach(memory), None)
    visible, hola, found = memory.window + memory.block, measured["hola"], []
    for key, other in measured.items():
        if key == "hola":
            continue
        parts = [
            _known(_recalled(hola, other, near), f"up to {visible} tokens back"),
            _known(_recalled(hola, other, far), "farther back"),
        ]
        known = f"Of repeated tokens it knows {parts[0]}, and {parts[1]}."
        found.append(f"{_loss(hola, other, names[key])} {known}")
    return found


def reach(memory: MemoryConfig) -> int:
    """How many ranges of distances lie within what a cache of the latest tokens may see."""
    return 2 if memory.window else 1


def _recalled(hola: Measured, other: Measured, part: slice) -> Difference:
    """Of the shares of repetitions known."""
    sums = (x[:, part].sum(1) for x in (hola.recall.right, other.recall.right, hola.recall.asked))
    return repetition.difference(*sums)


def _loss(hola: Measured, other: Measured, name: str) -> str:
    found = repetition.difference(hola.nats, other.nats, hola.tokens)
    lower, files = int((hola.nats < other.nats).sum()), len(hola.nats)
    spread = f"({found.value:+.4f} nats a token, standard error {found.error:.4f}; lower on {lower} of {files} files)"
    if not found.clear:
        return f"HOLA's perplexity and {name}'s differ by less than these files can tell {spread}."
    way = "below" if found.value < 0 else "above"
    return f"HOLA's perplexity is {abs(math.exp(found.value) - 1):.2%} {way} {name}'s {spread}."


def _known(part: Difference, where: str) -> str:
    spread = f"standard error {100 * part.error:.1f}"
    if not part.clear:
        return f"about as many {where} ({100 * part.value:+.1f} points, {spread})"
    return f"{abs(100 * part.value):.1f} points {'more' if part.value > 0 else 'fewer'} {where} ({spread})"


def as_json(measured: dict[str, Measured], texts: Texts) -> dict[str, Any]:
    """A table as plain values."""

    def by_range(values: np.ndarray) -> dict[str, float | None]:
        plain = [None if math.isnan(value) else float(value) for value in values]
        return dict(zip(texts.ranges, plain, strict=True))

    def of_files(each: Measured) -> dict[str, Any]:
        if not isinstance(texts, Files):
            return {}
        return {"perplexity": each.perplexity, "bits_per_byte": bits_per_byte(each, texts)}

    return {
        key: {
            "parameters": each.parameters,
            "tokens": int(each.tokens.sum()),
            **of_files(each),
            "repeated": by_range(each.recall.asked.sum(0)),
            "known": by_range(each.accuracy),
            "loss": by_range(each.loss),
        }
        for key, each in measured.items()
    }


def facts_figure(measured: dict[str, Measured], names: Names, memory: MemoryConfig, texts: Texts) -> str:
    """Answers by distance as curves, in HTML."""
    asked = int(sum(np.count_nonzero(far) for far in texts.distances))
    answers = by_distance(measured, names, texts, memory, "Share of the facts answered by each model, by distance")
    return (
        f"<figure><h3>Facts answered</h3>{answers}<figcaption>{asked:,} questions in {len(texts.rows)} rows of text like "
        "the one shown, by how many tokens before the fact was told. Whiskers: one standard error.</figcaption></figure>"
    )


def text_figures(measured: dict[str, Measured], names: Names, memory: MemoryConfig, texts: Files) -> str:
    """Perplexity as bars and repetitions by distance as curves, in HTML."""
    bars = charts.bars({key: each.perplexity for key, each in measured.items()}, names, "Perplexity of each model")
    known = by_distance(measured, names, texts, memory, "Share of the repetitions known by each model, by distance")
    return (
        f"<figure><h3>Perplexity of held-out files</h3>{bars}</figure>"
        f"<figure><h3>Repetitions known</h3>{known}<figcaption>{what_is_asked(texts)}</figcaption></figure>"
    )


def by_distance(measured: dict[str, Measured], names: Names, texts: Texts, memory: MemoryConfig, label: str) -> str:
    """Curves of the shares known, with the distance from which on recency's cache has nothing."""
    return charts.curves(
        [f"\u2264{edge}" for edge in texts.edges],
        {key: charts.Curve(each.accuracy.tolist(), each.error.tolist()) for key, each in measured.items()},
        names,
        label,
        reach(memory),
        "gone from recency's cache",
    )
