"""What each layer's exact cache keeps of a text, and where the read of each token looks.

The forward pass is the model's own: its blocks are called as the model calls them, and what their mixers hand to the
memory is noted on the way. From that the memory's own functions make the scores, the choice and the read once more. A
read's weights are what is read where the value of each token is the unit vector of its own position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from hola_jax.array_types import Array, Float, Int, Int32
from hola_jax.memory import CacheParams, MemoryConfig, init_state, validate
from hola_jax.memory.align import Inputs, Piece
from hola_jax.memory.by_xla import read_blocks, state_path
from hola_jax.memory.delta_rule import choose_scan
from hola_jax.memory.exact_cache import Rows, cache_of_blocks, token_scores
from hola_jax.memory.norms import for_reading
from hola_jax.memory.state import EMPTY
from hola_jax.model import Block, LanguageModel, Params


class Insight(NamedTuple):
    """Of a text of T tokens with n whole blocks, in each layer and head."""

    logits: Float[Array, "T E"]  # the model's, of the token that comes next
    surprise: Float[Array, "N T H"]  # beta |e|: how much of a token's value the state did not expect, and wrote
    scores: Float[
        Array, "N T H"
    ]  # what the tokens compete with: the surprise, unless the model is configured otherwise
    kept: Int32[
        Array, "N m H W"
    ]  # m = n + 1: positions that block 0, 1, .. finds in the cache, best first; -1 is empty
    weights: Float[Array, "N T H T"]  # of each token's read, by position; what is missing to one went to the null sink
    gate: Float[Array, "N H"]  # how much of what is read reaches the output

    @property
    def sink(self) -> Float[Array, "N T H"]:
        """What each token's read gave to the null sink."""
        return 1 - jnp.sum(self.weights, axis=-1)


class Look(NamedTuple):
    """The same of one memory and one row of T tokens."""

    surprise: Float[Array, "T H"]
    scores: Float[Array, "T H"]
    kept: Int32[Array, "m H W"]
    weights: Float[Array, "T H T"]

    @property
    def sink(self) -> Float[Array, "T H"]:
        """What each token's read gave to the null sink."""
        return 1 - jnp.sum(self.weights, axis=-1)


class Handed(NamedTuple):
    """What each layer handed to its memory, and what came back; leading axis N."""

    inputs: Inputs
    params: CacheParams
    out: Float[Array, "N B T H V"]


def insight(model: LanguageModel, tokens: Int[Array | np.ndarray, " T"]) -> Insight:
    """What a model whose mixer is HOLA keeps and reads of one text; the weights take N H T^2 numbers."""
    if model.config.mixer != "hola":
        raise ValueError(f"the model's mixer is {model.config.mixer!r}; only 'hola' has an exact cache to look into")
    _check_shown(model.config.memory)
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; it must be [T], one text of at least one token")
    structure, params = nnx.split(model)
    return _insight(structure, nnx.to_pure_dict(params), jnp.asarray(tokens, jnp.int32))


def memory_insight(
    q: Float[Array, "1 T h K"],
    k: Float[Array, "1 T h K"],
    v: Float[Array, "1 T H V"],
    beta: Float[Array, "1 T H"],
    log_decay: Array,
    cache_params: CacheParams,
    *,
    config: MemoryConfig,
) -> Look:
    """The same of the memory alone, for arrays as `hola_memory` takes them: one row, one document, from its beginning."""
    inputs = Inputs(q, k, v, beta, log_decay)
    validate.inputs(inputs, cache_params, config, None, None, None)
    if v.shape[0] != 1:
        raise ValueError(f"v has {v.shape[0]} rows; one can be looked into at a time, such as v[:1]")
    _check_shown(config)
    return _look(inputs, cache_params, config)


def not_shown(config: MemoryConfig) -> str:
    """Why it cannot be told what such a memory keeps and reads. Empty where it can: where the score of a token is what the
    memory gave it when it was written, and all that decides."""
    return "score='learned' is what a layer gives" if config.score == "learned" else config.rescored


def _check_shown(config: MemoryConfig) -> None:
    if why := not_shown(config):
        raise ValueError(
            f"what this memory keeps cannot be shown: {why}; it can where a score alone decides that is fixed when a token "
            "is written: surprise, residual, write, recency, random"
        )


def note_memory(block: Block) -> Callable[[], Handed]:
    """Notes what the block's mixer, HOLA, hands to its memory; to be asked after the block has run."""
    mixer, noted = block.mixer, []
    remember = mixer.remember

    def remembering(*arrays: Array, **context: Any) -> tuple[Array, Any]:
        out, memory = remember(*arrays, **context)
        noted.append(Handed(Inputs(*arrays), mixer.cache.params(), out))
        return out, memory

    mixer.remember = remembering
    return lambda: noted[0]


def handed(model: LanguageModel, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B T E"], Handed]:
    """(the model's logits, what its layers handed to their memories on the way)."""
    x, found = model.watched(tokens, note_memory)
    return model.head(model.norm(x)), found


@partial(jax.jit, static_argnums=0)
def _insight(structure: Any, params: Params, tokens: Array) -> Insight:
    model: LanguageModel = nnx.merge(structure, params)
    logits, found = handed(model, tokens[None])
    parts = lax.map(lambda layer: look(layer.inputs, layer.params, model.config.memory), found)
    gate = jax.nn.sigmoid(found.params.gate_logit.astype(jnp.float32))
    return Insight(logits[0], parts.surprise, parts.scores, parts.kept, parts.weights, gate)


def look(inputs: Inputs, params: CacheParams, config: MemoryConfig) -> Look:
    """Of one layer and one row of tokens."""
    length, heads = inputs.v.shape[1:3]
    tail = -length % config.block
    inputs = Inputs(*(jnp.pad(x, [(0, 0), (0, tail)] + [(0, 0)] * (x.ndim - 2)) for x in inputs))
    places = jnp.arange(length + tail, dtype=jnp.int32)
    documents = (places < length).astype(jnp.int32)[None]
    queries, keys = for_reading(inputs.q, inputs.k, heads, params, config)
    unit = jnp.broadcast_to(jnp.eye(length + tail, dtype=jnp.float32)[:, None], (1, *places.shape, heads, len(places)))
    piece = Piece(inputs, queries, keys, unit, documents, documents, several=False)
    state = init_state(config, 1, heads, keys.shape[3], len(places), keys.dtype, key_heads=keys.shape[2])

    def magnitude(config: MemoryConfig) -> Array | None:
        return state_path(piece, config, None, state.document, None).magnitude

    surprise = magnitude(dataclasses.replace(config, score="surprise"))
    assert surprise is not None
    own = surprise if config.score == "surprise" else magnitude(config)
    scores = token_scores(config, own, inputs.v, inputs.beta, places[None])
    ranked, whole = scores.swapaxes(1, 2), length // config.block
    weights, _ = read_blocks(True, piece, ranked, places[None], jnp.array([whole]), params, config, state)
    empty = Rows(state.document, state.cache_scores, jnp.zeros(state.cache_scores.shape, jnp.int32))
    rows = cache_of_blocks(ranked, documents, empty, config.block, choose_scan(config.scan))
    kept = jnp.where(rows.scores > -jnp.inf, rows.places - config.window, EMPTY)[: whole + 1, 0]
    return Look(surprise[0, :length], scores[0, :length], kept, weights[0, :length, :, :length])


_look = jax.jit(look, static_argnums=2)
