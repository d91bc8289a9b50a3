"""`hola demo`: a small HOLA and a small Gated DeltaNet, alike but for the exact cache, on text and on recall."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np

from hola_jax import LanguageModel, MemoryConfig, ModelConfig
from hola_jax.config import Mixer, parameter_count
from train.fit import fit, made_batches, rows_at_random, scores
from train.progress import clock
from train.sources import Recall, library_text

NAMES: dict[Mixer, str] = {"hola": "HOLA", "gated_deltanet": "Gated DeltaNet"}
TEXT = ModelConfig(
    vocab_size=256, dim=64, layers=2, heads=2, dtype="float32", memory=MemoryConfig(window=32, block=64, chunk=32)
)
RECALL = ModelConfig(
    vocab_size=Recall.vocab_size,
    dim=64,
    layers=2,
    heads=2,
    key_dim=16,
    value_dim=16,
    dtype="float32",
    memory=MemoryConfig(window=16, block=16, chunk=16),
)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train a small HOLA and a small Gated DeltaNet side by side, and print what each reached: `hola demo`.

    Both read the standard library's source (split by file into training and held-out text, bytes as tokens) and learn to
    recall planted facts. The numbers are printed whichever is better.
    """

    text_steps: int = 300
    """Training steps on text."""
    recall_steps: int = 400
    """Training steps on recall."""
    tokens: int = 256
    """Bytes of a row of text."""
    seed: int = 0
    """Of initial parameters and of the order of the data."""

    def __post_init__(self) -> None:
        for name in ("text_steps", "recall_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.tokens < 2:
            raise ValueError(f"--tokens is {self.tokens}; it must be at least 2")

    def run(self) -> None:
        start = time.monotonic()
        text = {mixer: self._text(mixer) for mixer in NAMES}
        recall = {mixer: self._recall(mixer) for mixer in NAMES}
        print(f"\n{'':16}{'parameters':>12}{'held-out perplexity':>22}{'recall':>10}")
        for mixer, name in NAMES.items():
            count = parameter_count(dataclasses.replace(TEXT, mixer=mixer))["total"]
            print(f"{name:16}{count:12,}{text[mixer]:18.3f} / byte{recall[mixer]:10.1%}")
        asked = f"{Recall.pairs} facts, asked again and again in {Recall.tokens} tokens"
        print(f"Recall: {asked}; guessing gives {1 / Recall.kind:.1%}. Done in {clock(time.monotonic() - start)}.")

    def _text(self, mixer: Mixer) -> float:
        train, held_out = library_text(self.tokens)
        model = LanguageModel(dataclasses.replace(TEXT, mixer=mixer), seed=self.seed)
        params = fit(model, rows_at_random(train, 8, self.seed), self.text_steps, 3e-3, f"{NAMES[mixer]:15}text  ")
        spread = held_out[np.linspace(0, len(held_out) - 1, min(256, len(held_out))).astype(int)].astype(np.int32)
        batches = [(rows, np.ones(rows.shape, bool)) for rows in np.array_split(spread, max(1, len(spread) // 16))]
        return math.exp(scores(model, params, batches)[0])

    def _recall(self, mixer: Mixer) -> float:
        task = Recall()
        model = LanguageModel(dataclasses.replace(RECALL, mixer=mixer), seed=self.seed)
        params = fit(
            model, made_batches(task.batch, 32, self.seed), self.recall_steps, 5e-3, f"{NAMES[mixer]:15}recall"
        )
        draw = np.random.default_rng(self.seed + 10**6)
        return scores(model, params, [task.batch(draw, 32, fewest=task.pairs) for _ in range(8)])[1]
