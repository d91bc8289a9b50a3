"""What a trained model makes of held-out rows: nats and hits of the tokens that count."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from hola_jax import LanguageModel
from hola_jax.array_types import Array
from hola_jax.diagnostics import depth_report
from train.data.loader import open_source
from train.feed import inputs
from train.study.config import Measure

TOKENS = 8192  # of a batch
HELD_OUT = 0  # the seed of what is measured: the same rows for all
LOOKED_AT = 8  # rows in which spikes and sinks are looked for


class Measured(NamedTuple):
    """Over all tokens that count."""

    nats: float  # mean of -log p
    accuracy: float  # share whose likeliest token was the one that came
    tokens: int


class OverDepth(NamedTuple):
    """Over all layers, in a few rows."""

    spike: float  # the largest activation, in medians of its depth
    sink: float | None  # share of heads whose reads rest on the first token; None where nothing reads tokens


def measured(model: LanguageModel, measure: Measure, row: int) -> Measured | OverDepth:
    """Of the measure's rows; `row` is the length of those in training."""
    length = measure.length or row
    vocabulary = model.config.vocab_size
    rows = open_source(measure.source, split="held_out", vocab_size=vocabulary, row=length, seed=HELD_OUT)
    count = min(measure.rows or len(rows), len(rows))
    if not count:
        raise ValueError(f"the held-out rows of {measure.source} are shorter than {length} tokens; ask for less")
    if measure.shows in ("spike", "sink"):
        return _over_depth(model, np.stack([rows[n]["tokens"][:length] for n in range(min(count, LOOKED_AT))]))
    structure, params = nnx.split(model)
    size = max(1, min(TOKENS // length, count))
    total = np.zeros(3)
    for start in range(0, count, size):
        found = [rows[number] for number in range(start, min(start + size, count))]
        batch = inputs({name: np.stack([each[name] for each in found]) for name in found[0]})
        short = size - len(found)  # the last batch is filled with rows of which nothing counts
        filled = {name: np.pad(x, [(0, short), (0, 0)]) for name, x in batch.items()}
        total += np.array(_sums(structure, params, filled), float)
    if not total[2]:
        raise ValueError(f"no token of the held-out rows of {measure.source} counts")
    return Measured(total[0] / total[2], total[1] / total[2], int(total[2]))


def _over_depth(model: LanguageModel, tokens: np.ndarray) -> OverDepth:
    report = depth_report(model, tokens)
    sink = None if report.masses is None else float(report.masses.sink_ratio)
    return OverDepth(float(jnp.max(report.reads.ratio)), sink)


@functools.partial(jax.jit, static_argnums=0)
def _sums(structure: nnx.GraphDef[LanguageModel], params: Any, batch: dict[str, Array]) -> tuple[Array, ...]:
    """Nats, hits and number of the tokens that count; compiled once for all measures of one shape."""
    model = nnx.merge(structure, params)
    hidden, _ = model.hidden(batch["tokens"], batch["segment_ids"])

    def of_row(part: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        hidden, targets, counts = part
        mask = counts > 0
        logits = model.head(hidden)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        nats = jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)
        return jnp.sum(nats), jnp.sum(mask & (jnp.argmax(logits, axis=-1) == targets)), jnp.sum(mask)

    nats, hits, counted = lax.map(of_row, (hidden, batch["targets"], batch["mask"]))
    return jnp.sum(nats), jnp.sum(hits), jnp.sum(counted)
