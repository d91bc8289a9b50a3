"""The three stores of LoLA's memory: what a block finds, how it is read, and what is left when the block is complete."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Bool, Float, Int, Int32
from hola_jax.memory.choice import best_by_position
from hola_jax.memory.delta_rule import HIGHEST
from hola_jax.memory.lola_state import LEAST_FEATURE, LEAST_MASS, LolaParams
from hola_jax.memory.state import EMPTY, select


class Held(NamedTuple):
    """What a block finds of the pairs before it; all of them are of one document."""

    document: Int32[Array, " B"]
    associations: Float[Array, "B H E V"]
    mass: Float[Array, "B H E"]
    keys: Float[Array, "B H W K"]
    values: Float[Array, "B H W V"]
    positions: Int32[Array, "B H W"]


class Block(NamedTuple):
    keys: Float[Array, "B H C K"]
    values: Float[Array, "B H C V"]
    documents: Int32[Array, "B C"]  # 0 where there is no pair, or one that nobody sees again
    positions: Int32[Array, "B C"]


def features(x: Float[Array, "B H X K"], weights: Float[Array, "H K F"]) -> Float[Array, "B H X E"]:
    """phi(x) = [softmax(x W), softmax(-x W)]."""
    z = jnp.einsum("bhxk,hkf->bhxf", x.astype(jnp.float32), weights.astype(jnp.float32), precision=HIGHEST)
    both = jnp.concatenate([jax.nn.softmax(z, axis=-1), jax.nn.softmax(-z, axis=-1)], axis=-1)
    return jnp.maximum(both, LEAST_FEATURE)


def of_document(held: Held, document: Int32[Array, " B"]) -> Held:
    """What is held of `document`: nothing where it is another."""
    empty = jax.tree.map(jnp.zeros_like, held)
    empty = empty._replace(document=document, positions=jnp.full_like(held.positions, EMPTY))
    return select(held.document == document, held, empty)


def merge(held: Held, block: Block, params: LolaParams) -> Held:
    """After a complete block: the pairs of its last document and the cache's compete, and who loses is absorbed."""
    held = of_document(held, jnp.maximum(held.document, jnp.max(block.documents, axis=1)))
    heads, window = held.positions.shape[1:]

    def of_heads(x: Array) -> Array:
        return jnp.broadcast_to(x[:, None], (x.shape[0], heads, x.shape[1]))

    own = (block.documents == held.document[:, None]) & (block.documents > 0)
    competes = jnp.concatenate([held.positions != EMPTY, of_heads(own)], axis=-1)
    positions = jnp.concatenate([held.positions, of_heads(block.positions)], axis=-1)
    keys = jnp.concatenate([held.keys, block.keys], axis=2)
    values = jnp.concatenate([held.values, block.values], axis=2)
    phi = features(keys, params.key_features)
    error = _self_recall_error(*lax.stop_gradient((phi, values, held.associations, held.mass)))
    scores = jnp.where(competes, error, -jnp.inf)
    best, index = best_by_position(scores, positions, window)
    filled, kept_positions = best > -jnp.inf, jnp.take_along_axis(positions, index, axis=-1)
    leaves = competes
    if window:  # behind the last that stays: by comparison, for a scatter does not divide over the devices of a mesh
        least, last = best[..., -1:], kept_positions[..., -1:]
        leaves = leaves & ((scores < least) | ((scores == least) & (positions > last)))
    absorbed = jnp.where(leaves[..., None], phi, 0.0)
    take = jax.vmap(jax.vmap(lambda rows, at: rows[at]))
    written = jnp.einsum("bhxf,bhxv->bhfv", absorbed, values.astype(jnp.float32), precision=HIGHEST)
    return Held(
        held.document,
        held.associations + written,
        held.mass + jnp.sum(absorbed, axis=2),
        jnp.where(filled[..., None], take(keys, index), 0),
        jnp.where(filled[..., None], take(values, index), 0),
        jnp.where(filled, kept_positions, EMPTY),
    )


def _self_recall_error(
    phi: Float[Array, "B H X E"],
    values: Float[Array, "B H X V"],
    associations: Float[Array, "B H E V"],
    mass: Float[Array, "B H E"],
) -> Float[Array, "B H X"]:
    found = jnp.einsum("bhxf,bhfv->bhxv", phi, associations, precision=HIGHEST)
    share = jnp.einsum("bhxf,bhf->bhx", phi, mass, precision=HIGHEST) + LEAST_MASS
    error = jnp.linalg.norm(found / share[..., None] - values.astype(jnp.float32), axis=-1)
    return jnp.where(jnp.isfinite(error), error, 0.0)


def _of_stored(spec: str, stored: Array, other: Array) -> Array:
    """A product in the type of the stored rows, accumulated in float32."""
    other = other.astype(stored.dtype)
    return jnp.einsum(spec, stored, other, precision=HIGHEST, preferred_element_type=jnp.float32)


def read(
    queries: Float[Array, "B H Q K"],
    documents: Int[Array, "B Q"],
    seen: Bool[Array, "B Q C"],
    held: Held,
    block: Block,
    params: LolaParams,
) -> Float[Array, "B H Q V"]:
    """The three stores under one normaliser, float32; `seen` of the block."""
    continues = documents == held.document[:, None]
    cached = (held.positions != EMPTY)[:, :, None] & continues[:, None, :, None]
    in_block = jnp.broadcast_to(seen[:, None], (*cached.shape[:3], seen.shape[2]))
    stores = ((held.keys, cached), (block.keys, in_block))
    logits = [jnp.where(mask, _of_stored("bhxk,bhqk->bhqx", keys, queries), -jnp.inf) for keys, mask in stores]
    logits = jnp.concatenate(logits, axis=-1) * queries.shape[-1] ** -0.5
    # All is times e^-shift, above and below: the absorbed pairs' part and the 1e-6, too. Below 0 it could overflow there.
    shift = lax.stop_gradient(jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), 0.0))
    mix = jax.nn.sigmoid(params.mix_logit.astype(jnp.float32))[:, None, None]
    exact = mix * jnp.exp(logits - shift)
    absorbed = (1 - mix) * jnp.exp(-shift) * features(queries, params.query_features)
    absorbed = jnp.where(continues[:, None, :, None], absorbed, 0.0)
    of_cache, of_block = jnp.split(exact, [held.keys.shape[2]], axis=-1)
    above = _of_stored("bhxv,bhqx->bhqv", held.values, of_cache) + _of_stored("bhxv,bhqx->bhqv", block.values, of_block)
    above = above + jnp.einsum("bhqf,bhfv->bhqv", absorbed, held.associations, precision=HIGHEST)
    below = jnp.sum(exact, axis=-1) + jnp.einsum("bhqf,bhf->bhq", absorbed, held.mass, precision=HIGHEST)
    return above / (below[..., None] + LEAST_MASS * jnp.exp(-shift))
