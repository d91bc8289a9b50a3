"""What may stand between a pair's score and its row of the cache: age, reads, a later pair of the same key, the other heads.

None of it is in the paper; docs/scores.md says what each is worth. All but age are decided when a block is complete, from
the cache and the block together, so blocks are ranked one after the other (`rescored`, `token`).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Float, Int, Int32
from hola_jax.memory.state import MemoryConfig

LEAST = 1e-30  # of a score whose logarithm is taken


def log_score(score: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.log(jnp.maximum(score, LEAST))


def weighed(config: MemoryConfig, score: Float[Array, "... H"], positions: Int[Array, "..."]) -> Float[Array, "... H"]:
    """A written score as it competes. A score that fades by e in `fade` tokens is, among all that fade alike, the logarithm
    and what it is younger by: fixed when it is written, so the order of two tokens never changes."""
    if config.fade is None and not config.read_credit:
        return score
    younger = 0.0 if config.fade is None else positions[..., None].astype(jnp.float32) / config.fade
    return log_score(score) + younger


def best_by_position(
    scores: Float[Array, "B H X"], positions: Int32[Array, "B H X"], window: int
) -> tuple[Float[Array, "B H W"], Int32[Array, "B H W"]]:
    """The `window` largest scores and where they stand, for rows that do not come in the order of earlier scores: among
    equals the earlier token."""
    index = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    best, _, index = lax.sort((-scores, positions, index), num_keys=2)
    return -best[..., :window], index[..., :window]


def best_of(
    config: MemoryConfig, scores: Float[Array, "B H X"], positions: Int32[Array, "B H X"], keys: Float[Array, "B H X K"]
) -> tuple[Float[Array, "B H W"], Int32[Array, "B H W"]]:
    """`best_by_position` of what competes, by all that a configuration says; a row that is left empty has -inf."""
    if config.same_key is not None:
        scores = superseded(scores, positions, keys, config.same_key)
    best, index = best_by_position(scores, positions, config.window)
    if config.budget is not None:
        best = within_budget(best, jnp.take_along_axis(positions, index, axis=-1), config.budget)
    return best, index


def superseded(
    scores: Float[Array, "B H X"], positions: Int32[Array, "B H X"], keys: Float[Array, "B H X K"], cosine: float
) -> Float[Array, "B H X"]:
    """-inf for a pair that has a later one of the same key, which takes the larger of both scores."""
    keys = lax.stop_gradient(keys).astype(jnp.float32)
    unit = keys * lax.rsqrt(jnp.maximum(jnp.sum(keys * keys, axis=-1, keepdims=True), LEAST))
    alike = jnp.einsum("bhxk,bhyk->bhxy", unit, unit, precision=lax.Precision.HIGHEST) >= cosine
    there = scores > -jnp.inf
    later = positions[..., None, :] > positions[..., None]  # [x, y]: y came after x
    gives_way = alike & later & there[..., None] & there[..., None, :]
    inherited = jnp.max(jnp.where(gives_way, scores[..., None], -jnp.inf), axis=-2)
    return jnp.where(jnp.any(gives_way, axis=-1), -jnp.inf, jnp.maximum(scores, inherited))


def within_budget(
    scores: Float[Array, "B H W"], positions: Int32[Array, "B H W"], budget: int
) -> Float[Array, "B H W"]:
    """-inf for all but the `budget` best rows of all heads: among equals the earlier token, then the earlier head."""
    shape = scores.shape
    flat = -scores.reshape(shape[0], -1), positions.reshape(shape[0], -1)
    index = lax.broadcasted_iota(jnp.int32, flat[0].shape, 1)
    order = lax.sort((*flat, index), num_keys=3)[2]
    rank = jnp.argsort(order, axis=1).reshape(shape)
    return jnp.where(rank < budget, scores, -jnp.inf)
