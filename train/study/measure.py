"""What a trained model makes of held-out rows: nats and hits of the tokens that count."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from hola_jax import LanguageModel
from hola_jax.array_types import Array
from train.data.loader import open_source
from train.feed import inputs
from train.study.config import Measure

TOKENS = 8192  # of a batch
HELD_OUT = 0  # the seed of what is measured: the same rows for all


class Measured(NamedTuple):
    """Over all tokens that count."""

    nats: float  # mean of -log p
    accuracy: float  # share whose likeliest token was the one that came
    tokens: int


def measured(model: LanguageModel, measure: Measure, row: int) -> Measured:
    """Of the measure's rows; `row` is the length of those in training."""
    length = measure.length or row
    vocabulary = model.config.vocab_size
    rows = open_source(measure.source, split="held_out", vocab_size=vocabulary, row=length, seed=HELD_OUT)
    count = min(measure.rows or len(rows), len(rows))
    if not count:
        raise ValueError(f"the held-out rows of {measure.source} are shorter than {length} tokens; ask for less")
    structure, params = nnx.split(model)

    @jax.jit
    def sums(batch: dict[str, Array]) -> tuple[Array, Array, Array]:
        whole = nnx.merge(structure, params)
        hidden, _ = whole.hidden(batch["tokens"], batch["segment_ids"])

        def of_row(part: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            hidden, targets, mask = part
            logits = whole.head(hidden)
            chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
            nats = jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)
            return jnp.sum(nats), jnp.sum(mask & (jnp.argmax(logits, axis=-1) == targets)), jnp.sum(mask)

        nats, hits, counted = lax.map(of_row, (hidden, batch["targets"], batch["mask"]))
        return jnp.sum(nats), jnp.sum(hits), jnp.sum(counted)

    size = max(1, min(TOKENS // length, count))
    total = np.zeros(3)
    for start in range(0, count, size):
        found = [rows[number] for number in range(start, min(start + size, count))]
        batch = inputs({name: np.stack([each[name] for each in found]) for name in found[0]})
        short = size - len(found)  # the last batch is filled with rows of which nothing counts
        total += np.array(sums({name: np.pad(x, [(0, short), (0, 0)]) for name, x in batch.items()}), float)
    if not total[2]:
        raise ValueError(f"no token of the held-out rows of {measure.source} counts")
    return Measured(total[0] / total[2], total[1] / total[2], int(total[2]))
