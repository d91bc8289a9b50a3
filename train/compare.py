"""What the demo's models made of held-out files: perplexity, recall by distance, and what of it is more than noise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from hola_jax import LanguageModel, MemoryConfig
from hola_jax.config import parameter_count
from hola_jax.diagnostics import charts, repetition
from hola_jax.diagnostics.repetition import Difference, Recall
from hola_jax.evals import ModelScorer
from train.config import TrainConfig
from train.data import folder
from train.data.config import LibraryText
from train.data.tokenizers import Tokenizer
from train.progress import Progress

CONTEXT = 3  # tokens that must stand together again before a fourth for a repetition
PIECE = 512  # tokens of a row that go through the model at a time: all rows are padded to it, for one compiled program


@dataclasses.dataclass(frozen=True)
class Texts:
    """Held-out files, and the repetitions in them that no training file has."""

    names: list[str]
    rows: list[np.ndarray]  # tokens of each, int32
    distances: list[np.ndarray]  # of each token: `repetition.distances`
    edges: list[int]  # of the ranges of distances
    size: int  # bytes of all predicted tokens
    tokenizer: Tokenizer

    @staticmethod
    def of_library(config: TrainConfig, longest: int) -> Texts:
        """The first `longest` tokens of each held-out file."""
        source: LibraryText = config.data
        train, tokenizer = folder.documents(source, "train")
        documents, _ = folder.documents(source, "held_out")
        names = folder.texts(source, "held_out")
        chosen = {name: row[:longest].astype(np.int32) for name, row in zip(names, documents, strict=True)}
        chosen = {name: row for name, row in chosen.items() if len(row) > CONTEXT}
        rows, vocab_size = list(chosen.values()), tokenizer.vocab_size
        known = repetition.known_sequences(train, CONTEXT + 1, vocab_size)
        memory = config.model.memory
        return Texts(
            list(chosen),
            rows,
            [repetition.distances(row, CONTEXT, vocab_size, known) for row in rows],
            repetition.edges(memory.window, memory.block, min(longest, max(map(len, rows)))),
            sum(len(tokenizer.decode(row[1:]).encode()) for row in rows),
            tokenizer,
        )


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one model; arrays have a number for each text."""

    parameters: int
    tokens: np.ndarray
    nats: np.ndarray
    recall: Recall

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.nats.sum() / self.tokens.sum())

    @property
    def accuracy(self) -> np.ndarray:
        """Of the repetitions, by range of distances; NaN where there is none."""
        count = self.recall.asked.sum(0)
        return np.divide(self.recall.right.sum(0), count, out=np.full(count.shape, np.nan), where=count > 0)

    @property
    def error(self) -> np.ndarray:
        """Its standard error."""
        right, count = self.recall.right, self.recall.asked
        none = np.zeros(len(count))
        return np.array([repetition.difference(r, none, c).error for r, c in zip(right.T, count.T, strict=True)])


def measure(model: LanguageModel, texts: Texts, label: str) -> Measured:
    """What a model makes of the texts."""
    scorer = ModelScorer(model, piece=PIECE, batch_tokens=8 * PIECE)
    progress, done = Progress(f"{label}: held-out files", len(texts.rows)), 0

    def show(rows: int) -> None:
        nonlocal done
        done = min(done + rows, len(texts.rows))
        progress.show(done, last=done == len(texts.rows))

    padded = [np.pad(row, (0, -(len(row) - 1) % PIECE)) for row in texts.rows]
    padded += [padded[0][: PIECE + 1]] * (-len(padded) % 8)  # whole batches: one shape, one program
    scored = scorer.loglikelihood(padded, show)
    nats = [-each.logprob[: len(row) - 1].astype(float) for each, row in zip(scored, texts.rows, strict=False)]
    right = [each.greedy[: len(row) - 1] for each, row in zip(scored, texts.rows, strict=False)]
    return Measured(
        parameter_count(model.config)["total"],
        np.array([len(each) for each in nats]),
        np.array([each.sum() for each in nats]),
        repetition.recall([far[1:] for far in texts.distances], right, nats, texts.edges),
    )


def ranges(edges: list[int]) -> list[str]:
    """What the ranges of distances are called."""
    return [f"{start + 1}-{stop}" for start, stop in zip([0, *edges], edges, strict=False)]


def table(measured: dict[str, Measured], names: dict[str, str], texts: Texts) -> str:
    """Perplexity, and accuracy by distance, of each model."""
    spans = [f"{span:>9}" for span in ranges(texts.edges)]
    first = f"{'':18}{'parameters':>10}{'perplexity':>12}{'bits/byte':>11}   {'repeated tokens known, by distance':>34}"
    lines = [first, " " * 51 + "".join(spans)]
    for key, each in measured.items():
        bits = each.nats.sum() / math.log(2) / texts.size
        shares = "".join(f"{share:9.1%}" for share in each.accuracy)
        lines.append(f"{names[key]:18}{each.parameters:10,}{each.perplexity:12.2f}{bits:11.3f}{shares}")
    counts = next(iter(measured.values())).recall.asked.sum(0)
    lines.append(f"{'tokens':18}{'':10}{int(next(iter(measured.values())).tokens.sum()):12,}{'':11}")
    lines[-1] += "".join(f"{int(count):9,}" for count in counts)
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """HOLA against another model, from which it differs in its memory alone."""

    other: str
    loss: Difference  # nats per token; below 0 HOLA is better
    lower: int  # texts on which HOLA's loss is the lower one
    near: Difference  # share of repetitions known that a cache of the latest tokens may still see
    far: Difference  # ... and of those farther away; above 0 HOLA is better


def compare(hola: Measured, other: Measured, name: str, reach: int) -> Comparison:
    """`reach`: how many ranges of distances lie within what a cache of the latest tokens may see."""

    def known(part: slice) -> Difference:
        right, base, count = (x[:, part].sum(1) for x in (hola.recall.right, other.recall.right, hola.recall.asked))
        return repetition.difference(right, base, count)

    return Comparison(
        name,
        repetition.difference(hola.nats, other.nats, hola.tokens),
        int((hola.nats < other.nats).sum()),
        known(slice(0, reach)),
        known(slice(reach, None)),
    )


def reach(memory: MemoryConfig) -> int:
    """Ranges of distances within the running block and a cache of the latest tokens."""
    return 2 if memory.window else 1


def sentences(measured: dict[str, Measured], names: dict[str, str], memory: MemoryConfig, texts: Texts) -> list[str]:
    """What was found, whichever way it came out."""
    visible = memory.window + memory.block
    others = [key for key in measured if key != "hola"]
    found = []
    for key in others:
        each = compare(measured["hola"], measured[key], names[key], reach(memory))
        found.append(_of_loss(each, len(texts.rows)) + " " + _of_recall(each, visible))
    runs = "One seed, one small size: another seed may turn what is close around."
    return [*found, runs]


def _of_loss(each: Comparison, texts: int) -> str:
    ratio = math.exp(each.loss.value) - 1
    spread = f"({each.loss.value:+.4f} nats a token, standard error {each.loss.error:.4f}"
    spread += f"; lower on {each.lower} of {texts} files)"
    if not each.loss.clear:
        return f"HOLA's perplexity and {each.other}'s differ by less than these files can tell {spread}."
    word = "below" if ratio < 0 else "above"
    return f"HOLA's perplexity is {abs(ratio):.1%} {word} {each.other}'s {spread}."


def _of_recall(each: Comparison, visible: int) -> str:
    parts = [_known(each.near, f"up to {visible} tokens back"), _known(each.far, "farther back")]
    return f"Of repeated tokens, it knows {parts[0]}, and {parts[1]}."


def _known(part: Difference, where: str) -> str:
    points = f"{abs(100 * part.value):.1f} points (standard error {100 * part.error:.1f})"
    if not part.clear:
        return f"about as many {where} ({100 * part.value:+.1f} points, standard error {100 * part.error:.1f})"
    return f"{points} {'more' if part.value > 0 else 'fewer'} {where}"


def as_json(measured: dict[str, Measured], texts: Texts) -> dict[str, Any]:
    """The table as plain values."""
    return {
        key: {
            "parameters": each.parameters,
            "perplexity": each.perplexity,
            "bits_per_byte": float(each.nats.sum() / math.log(2) / texts.size),
            "tokens": int(each.tokens.sum()),
            "repetitions": dict(zip(ranges(texts.edges), each.recall.asked.sum(0).astype(int).tolist(), strict=True)),
            "known": dict(zip(ranges(texts.edges), [_or_none(x) for x in each.accuracy], strict=True)),
            "nats": dict(
                zip(ranges(texts.edges), [_or_none(x) for x in _mean(each.recall.nats, each.recall.asked)], strict=True)
            ),
        }
        for key, each in measured.items()
    }


def _mean(sums: np.ndarray, count: np.ndarray) -> np.ndarray:
    total = count.sum(0)
    return np.divide(sums.sum(0), total, out=np.full(total.shape, np.nan), where=total > 0)


def _or_none(x: float) -> float | None:
    return None if math.isnan(x) else float(x)


def figures(measured: dict[str, Measured], names: dict[str, str], texts: Texts, memory: MemoryConfig) -> str:
    """Perplexity as bars and recall as curves, in HTML."""
    visible = memory.window + memory.block
    bars = charts.bars({key: each.perplexity for key, each in measured.items()}, names, "Held-out perplexity")
    found = {key: charts.Curve(each.accuracy.tolist(), each.error.tolist()) for key, each in measured.items()}
    known = charts.curves(
        ranges(texts.edges),
        found,
        names,
        "Repeated tokens known, by distance",
        reach(memory),
        f"beyond {visible}: not recency's",
    )
    count = int(next(iter(measured.values())).recall.asked.sum())
    return (
        f"<figure><h2>Perplexity of a held-out token</h2>{bars}</figure>"
        f"<figure><h2>Repetitions known, by distance</h2>{known}"
        f"<figcaption>{count:,} tokens of {len(texts.rows)} held-out files end {CONTEXT + 1} tokens that stood earlier in "
        "their file and nowhere in the training text: only a memory of the file can know them. Whiskers: one standard "
        "error, files drawn anew.</figcaption></figure>"
    )
