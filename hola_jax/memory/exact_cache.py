"""The exact cache (the hippocampus): scores, the top-W merge, and which tokens each block finds in the cache.

The merge is a monoid on rows (document, score, place): the best W of two runs of tokens come from the best W of each.
Rows name tokens by their place, so choosing is integer work on scores and no gradient flows through it; keys and values
are gathered afterwards by place, and the gradient flows through that gather back to their source tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Float, Int, Int32
from hola_jax.memory.choice import weighed
from hola_jax.memory.delta_rule import Magnitude
from hola_jax.memory.learned import competing
from hola_jax.memory.scan import Strategy, prefix_scan
from hola_jax.memory.state import RESCORED, MemoryConfig


class Rows(NamedTuple):
    """The W best tokens of a run, best first and earlier first among equals; score -inf where a row is empty."""

    document: Int32[Array, " B"]  # the run's last document, to which all rows belong; 0 if the run is empty
    scores: Float[Array, "B H W"]
    places: Int32[Array, "B H W"]


def best_rows(scores: Float[Array, "*n B H X"], places: Int32[Array, "*n B H X"], window: int) -> tuple[Array, Array]:
    """The `window` largest scores and their places; among equals the one that stands first. Fewer rows than that are
    filled up with empty ones."""
    short = window - scores.shape[-1]
    if short > 0:
        pad = [(0, 0)] * (scores.ndim - 1) + [(0, short)]
        scores, places = jnp.pad(scores, pad, constant_values=-jnp.inf), jnp.pad(places, pad)
    best, index = lax.top_k(scores, window)
    return best, jnp.take_along_axis(places, index, axis=-1)


def merge(left: Rows, right: Rows) -> Rows:
    """The best rows of two neighbouring runs; a document that ended competes no more."""
    document = jnp.maximum(left.document, right.document)

    def living(rows: Rows) -> Array:
        return jnp.where((rows.document == document)[:, None, None], rows.scores, -jnp.inf)

    scores = jnp.concatenate([living(left), living(right)], axis=-1)
    places = jnp.concatenate([left.places, right.places], axis=-1)
    return Rows(document, *best_rows(scores, places, left.scores.shape[-1]))


def run_rows(
    scores: Float[Array, "*n B H X"], documents: Int[Array, "*n B X"], first_place: Int[Array, "*n"], window: int
) -> Rows:
    """The elements of runs of tokens; the tokens of a run stand at consecutive places."""
    document = jnp.max(documents, axis=-1)
    competes = (documents == document[..., None]) & (documents > 0)
    scores = jnp.where(competes[..., None, :], scores, -jnp.inf)
    places = first_place[..., None, None, None] + jnp.arange(scores.shape[-1], dtype=jnp.int32)
    places = jnp.broadcast_to(places, scores.shape)
    return Rows(document.astype(jnp.int32), *best_rows(scores, places, window))


def cache_of_blocks(
    scores: Float[Array, "B H T"], documents: Int[Array, "B T"], initial: Rows, block: int, strategy: Strategy
) -> Rows:
    """The cache that each of T / C blocks finds, and last the one after all of them: leading axis T / C + 1. Places of
    the tokens start at W, behind the rows of the cache that the first block finds."""
    batch, heads, length = scores.shape
    window, blocks = initial.scores.shape[-1], length // block
    by_block = scores.reshape(batch, heads, blocks, block).transpose(2, 0, 1, 3)
    documents_by_block = documents.reshape(batch, blocks, block).transpose(1, 0, 2)
    first = window + block * jnp.arange(blocks, dtype=jnp.int32)
    elements = run_rows(by_block, documents_by_block, first, window)
    before, final = prefix_scan(lambda element, state: merge(state, element), merge, elements, initial, strategy)
    return Rows(*(jnp.concatenate([a, b[None]]) for a, b in zip(before, final, strict=True)))


def hashed_score(positions: Int[Array, "..."], heads: int, seed: int) -> Float[Array, "... H"]:
    """A number in [0, 1) for each position and head that looks random and is the same in every split of a sequence."""
    x = positions[..., None].astype(jnp.uint32) * jnp.uint32(heads) + jnp.arange(heads, dtype=jnp.uint32)
    x = x ^ jnp.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = (x ^ (x >> 16)) * jnp.uint32(multiplier)
        x = x ^ (x >> 15)
    return (x >> 8).astype(jnp.float32) * (1.0 / (1 << 24))


def token_scores(
    config: MemoryConfig,
    magnitude: Float[Array, "... H"] | None,
    v: Float[Array, "... H V"],
    beta: Float[Array, "... H"],
    positions: Int[Array, "..."],
    learned: Float[Array, "... H"] | None = None,
) -> Float[Array, "... H"]:
    """What each token competes with for a row of the cache. Recency counts in float32: beyond 2**24 tokens neighbours tie,
    and the earlier stays. `magnitude` is what the state path reports for the scores that need it."""
    heads = v.shape[-2]
    if config.score in RESCORED:  # made at the block's end
        return jnp.zeros(v.shape[:-1], jnp.float32)
    if config.score == "learned":
        assert learned is not None
        return lax.stop_gradient(competing(learned.astype(jnp.float32), config.sparsity))
    if config.score == "write":
        magnitude = beta * jnp.linalg.norm(v.astype(jnp.float32), axis=-1)
    if config.score == "recency":
        return jnp.broadcast_to(positions[..., None].astype(jnp.float32), (*positions.shape, heads))
    if config.score == "random":
        return hashed_score(positions, heads, config.seed)
    assert magnitude is not None
    return weighed(config, lax.stop_gradient(magnitude), positions)


def magnitude_kind(config: MemoryConfig) -> Magnitude | None:
    return config.score if config.score in ("surprise", "residual") else None
