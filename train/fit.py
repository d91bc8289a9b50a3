"""A small training loop: one compiled step, AdamW with warmup and cosine, no cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hola_jax import LanguageModel, functional
from hola_jax.array_types import Array
from hola_jax.losses import next_token_loss
from hola_jax.model import Params, weight_decay_mask
from train.progress import Progress

Batch = tuple[np.ndarray, np.ndarray]  # tokens [B, T]; mask [B, T] of the tokens whose successor counts


def fit(model: LanguageModel, batches: Iterator[Batch], steps: int, peak: float, label: str) -> Params:
    """The model's parameters after `steps` batches."""
    forward, params = functional(model)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 20), steps, peak / 10)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.01, mask=weight_decay_mask(model)),
    )

    @jax.jit
    def step(
        params: Params, moments: optax.OptState, tokens: Array, mask: Array
    ) -> tuple[Params, optax.OptState, Array]:
        def loss_of(params: Params) -> Array:
            logits, _ = forward(params, tokens)
            return next_token_loss(logits[:, :-1], tokens[:, 1:], mask[:, :-1])

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    moments = optimizer.init(params)
    progress = Progress(label, steps)
    for number in progress.over(range(steps)):
        params, moments, loss = step(params, moments, *next(batches))
        if number % 20 == 0:
            progress.note = f"loss {float(loss):.3f}"
    return params


def scores(model: LanguageModel, params: Params, batches: list[Batch]) -> tuple[float, float]:
    """(mean negative log likelihood in nats, share of tokens predicted right) over what the masks name."""
    forward, _ = functional(model)

    @jax.jit
    def measure(params: Params, tokens: Array, mask: Array) -> tuple[Array, Array, Array]:
        logits, _ = forward(params, tokens)
        logits, targets, mask = logits[:, :-1], tokens[:, 1:], mask[:, :-1]
        right = (jnp.argmax(logits, axis=-1) == targets) & mask
        count = jnp.sum(mask)
        return next_token_loss(logits, targets, mask) * count, jnp.sum(right), count

    totals = np.sum([[float(x) for x in measure(params, *batch)] for batch in batches], axis=0)
    return totals[0] / totals[2], totals[1] / totals[2]


def rows_at_random(rows: np.ndarray, batch: int, seed: int) -> Iterator[Batch]:
    """Batches of whole rows, drawn without end."""
    draw = np.random.default_rng(seed)
    while True:
        tokens = rows[draw.integers(len(rows), size=batch)].astype(np.int32)
        yield tokens, np.ones(tokens.shape, bool)


def made_batches(make: Callable[[np.random.Generator, int], Batch], batch: int, seed: int) -> Iterator[Batch]:
    """Batches of a task that is made on the fly, without end."""
    draw = np.random.default_rng(seed)
    while True:
        yield make(draw, batch)
