"""What the demo's models make of held-out text: the loss of every token, and of the repetitions by distance."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from hola_jax import LanguageModel
from hola_jax.config import parameter_count
from hola_jax.diagnostics import repetition
from hola_jax.diagnostics.repetition import Recall
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
    """Held-out texts, and what repeats in them."""

    names: list[str]
    rows: list[np.ndarray]  # tokens of each, int32
    distances: list[np.ndarray]  # of each token: how long ago what ends with it stood last, 0 for never
    edges: list[int]  # of the ranges of distances

    @property
    def ranges(self) -> list[str]:
        """What the ranges of distances are called."""
        return [f"{start + 1}-{stop}" for start, stop in zip([0, *self.edges], self.edges, strict=False)]


@dataclasses.dataclass(frozen=True)
class Files(Texts):
    """Held-out files, and the repetitions in them that no training file has."""

    size: int  # bytes of all predicted tokens
    tokenizer: Tokenizer
    known: np.ndarray  # the sequences that training files have

    def repetitions(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Of another text the tokens, and how far back each stood."""
        row = np.array(self.tokenizer.encode([text])[0], np.int32)
        return row, repetition.distances(row, CONTEXT, self.tokenizer.vocab_size, self.known)


def held_out_files(config: TrainConfig, longest: int) -> Files:
    """The first `longest` tokens of each held-out file of the library."""
    source: LibraryText = config.data
    train, tokenizer = folder.documents(source, "train")
    documents, _ = folder.documents(source, "held_out")
    names = folder.texts(source, "held_out")
    chosen = {name: row[:longest].astype(np.int32) for name, row in zip(names, documents, strict=True)}
    chosen = {name: row for name, row in chosen.items() if len(row) > CONTEXT}
    rows, vocab_size = list(chosen.values()), tokenizer.vocab_size
    known = repetition.known_sequences(train, CONTEXT + 1, vocab_size)
    memory = config.model.memory
    return Files(
        list(chosen),
        rows,
        [repetition.distances(row, CONTEXT, vocab_size, known) for row in rows],
        repetition.edges(memory.window, memory.block, min(longest, max(map(len, rows)))),
        sum(len(tokenizer.decode(row[1:]).encode()) for row in rows),
        tokenizer,
        known,
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
        """Share of the repetitions that were its first guess, by range of distances; NaN where there is none."""
        return _ratio(self.recall.right, self.recall.asked)

    @property
    def error(self) -> np.ndarray:
        """The standard error of that."""
        right, asked = self.recall.right, self.recall.asked
        none = np.zeros(len(asked))
        return np.array([repetition.difference(r, none, a).error for r, a in zip(right.T, asked.T, strict=True)])

    @property
    def loss(self) -> np.ndarray:
        """Of the repetitions, in nats, likewise."""
        return _ratio(self.recall.nats, self.recall.asked)


def _ratio(sums: np.ndarray, asked: np.ndarray) -> np.ndarray:
    total = asked.sum(0)
    return np.divide(sums.sum(0), total, out=np.full(total.shape, np.nan), where=total > 0)


def measure(model: LanguageModel, texts: Texts, label: str) -> Measured:
    """What a model makes of the texts."""
    scorer = ModelScorer(model, piece=PIECE, batch_tokens=8 * PIECE)
    progress, done = Progress(f"{label}: held-out text", len(texts.rows)), 0

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
