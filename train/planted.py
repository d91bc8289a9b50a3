"""Facts planted in held-out files: rows to measure a memory by, and one of them to look at, in words."""

from __future__ import annotations

import dataclasses

import numpy as np

from hola_jax.diagnostics import repetition
from train.compare import Texts
from train.config import TrainConfig
from train.data.config import Facts
from train.data.loader import open_source
from train.data.tokenizers import Tokenizer

HELD_OUT = 0  # the seed of what is measured: the same rows for all
ALONE = 1  # tokens before a value that name it: its key
_PEOPLE = (
    "Ada Alan Anna Arlo Beth Cara Cleo Cyril Dina Emil Enid Felix Gina Hugo Ida Igor Iris Ivan Jana Jonas Karl Lina Luis "
    "Mara Milo Nora Olga Otto Rosa Sven Theo Zoe"
)
_PLACES = (
    "Accra Athens Berlin Boston Cairo Cork Dakar Delhi Dublin Essen Genoa Hanoi Havana Izmir Kabul Kyiv Lagos Lima Lisbon "
    "London Madrid Minsk Nairobi Oslo Paris Perth Prague Quito Rome Seoul Tunis Vienna"
)
PEOPLE, PLACES = _PEOPLE.split(), _PLACES.split()


def planted(config: TrainConfig, length: int, count: int) -> Texts:
    """Rows of held-out text with as many facts in each as a training row has at most; what repeats are the answers."""
    facts: Facts = config.data
    rows = open_source(
        dataclasses.replace(facts, fewest=facts.most, answers_count=None),  # the mask then tells the answers
        split="held_out",
        vocab_size=config.model.vocab_size,
        row=length,
        seed=HELD_OUT,
    )
    found = [rows[number] for number in range(count)]
    memory = config.model.memory
    return Texts(
        [f"row {number}" for number in range(count)],
        [row["tokens"][:length] for row in found],
        [answers(row["tokens"][:length], row["mask"], config.model.vocab_size) for row in found],
        repetition.edges(memory.window, memory.block, length),
    )


def answers(tokens: np.ndarray, mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """int32 [T]: how many tokens ago the fact was told of which a token is the answer; 0 where it is none."""
    answered = np.append(False, mask)[: len(tokens)]
    return np.where(answered, repetition.distances(tokens, ALONE, vocab_size), 0)


def spoken(tokens: np.ndarray, tokenizer: Tokenizer) -> tuple[list[str], list[int]]:
    """(the text of each token, which of them are of facts): the keys are people, the values where they live."""
    first, words = tokenizer.vocab_size, [f" {name} lives in" for name in PEOPLE] + [f" {name}. " for name in PLACES]
    texts = [words[token - first] if token >= first else tokenizer.decode([token]) for token in tokens]
    return texts, np.flatnonzero(tokens >= first).tolist()
