"""How the next token is chosen from its logits: one row of settings for each row of a batch.

A row's draw depends on its own logits, its seed and its position, and on nothing else of the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hola_jax.array_types import Array, Bool, Float, Int32
from hola_jax.config import unknown_name

Sampler = Literal["greedy", "sample"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a row chooses its tokens. The filters apply in the order in which they stand here; ties at a threshold stay.

    sampler             "greedy" takes the likeliest token; "sample" draws one
    repetition_penalty  divides the positive logits of tokens that the row holds already, and multiplies the negative
    temperature         divides the logits; 0 is greedy
    top_k               so many of the likeliest tokens stay; 0 keeps all
    top_p               of those, the fewest whose probabilities reach this sum
    min_p               and those at least so likely as this share of the likeliest
    """

    sampler: Sampler = "sample"
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.sampler not in get_args(Sampler):
            raise unknown_name("sampler", self.sampler, get_args(Sampler))
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k!r}; it must be an integer of at least 0")
        allowed = {
            "repetition_penalty": ("above 0", lambda x: 0 < x < math.inf),
            "temperature": ("at least 0", lambda x: 0 <= x < math.inf),
            "top_p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
            "min_p": ("at least 0 and at most 1", lambda x: 0 <= x <= 1),
        }
        for name, (words, is_allowed) in allowed.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not is_allowed(value):
                raise ValueError(f"{name} is {value!r}; it must be a number {words}")


GREEDY = Sampling(sampler="greedy")
"""The likeliest token, always."""


class Settings(NamedTuple):
    """`Sampling` of each row, as arrays."""

    temperature: Float[Array, " B"]  # 0 is greedy
    top_k: Int32[Array, " B"]  # 0 keeps all
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    seed: Array  # [B] uint32


def settings(samplings: Sequence[Sampling], seeds: Sequence[int], width: int) -> Settings:
    """Those of the rows, filled up with greedy ones to `width`. Of a seed the lower 32 bits count."""
    rows = [*samplings, *[GREEDY] * (width - len(samplings))]

    def column(name: str) -> Array:
        return jnp.asarray(np.array([getattr(row, name) for row in rows], np.float32))

    temperature = [0.0 if row.sampler == "greedy" else row.temperature for row in rows]
    seed = [seed & 0xFFFFFFFF for seed in seeds] + [0] * (width - len(seeds))
    return Settings(
        temperature=jnp.asarray(np.array(temperature, np.float32)),
        top_k=jnp.asarray(np.array([min(row.top_k, 2**31 - 1) for row in rows], np.int32)),
        top_p=column("top_p"),
        min_p=column("min_p"),
        repetition_penalty=column("repetition_penalty"),
        seed=jnp.asarray(np.array(seed, np.uint32)),
    )


def choose(
    logits: Float[Array, "B E"], seen: Bool[Array, "B E"], position: Int32[Array, " B"], rows: Settings
) -> Int32[Array, " B"]:
    """The next token of each row, which will stand at `position`."""
    penalty = rows.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> Array:
        # Greedy rows are overruled below; a division by their 0 must not be made.
        scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
        filters = (rows.top_k > 0) | (rows.top_p < 1)
        floor = lax.cond(jnp.any(filters), lambda: _floor(scaled, rows), lambda: jnp.full(scaled.shape[:1], -jnp.inf))
        top = jnp.max(scaled, axis=-1)
        floor = jnp.maximum(floor, top + jnp.log(rows.min_p))
        # A row whose top logits are equal up to rounding keeps its top all the same.
        kept = jnp.where(scaled >= jnp.minimum(floor, top)[:, None], scaled, -jnp.inf)
        noise = jax.vmap(lambda seed, at: _noise(seed, at, scaled.shape[-1]))(rows.seed, position)
        return jnp.where(rows.temperature > 0, jnp.argmax(kept + noise, axis=-1).astype(jnp.int32), likeliest)

    return lax.cond(jnp.any(rows.temperature > 0), drawn, lambda: likeliest)


def _floor(scaled: Float[Array, "B E"], rows: Settings) -> Float[Array, " B"]:
    """The least logit that top_k and top_p leave in each row."""
    count = scaled.shape[-1]
    descending = -jnp.sort(-scaled, axis=-1)
    index = jnp.arange(count)
    top_k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, count), count)[:, None]
    probability = jax.nn.softmax(jnp.where(index < top_k, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    within = (index < top_k) & ((before < rows.top_p[:, None]) | (rows.top_p >= 1)[:, None])
    last = jnp.maximum(jnp.sum(within, axis=-1), 1) - 1
    return jnp.take_along_axis(descending, last[:, None], axis=-1)[:, 0]


def _noise(seed: Array, position: Array, count: int) -> Array:
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (count,), jnp.float32)
