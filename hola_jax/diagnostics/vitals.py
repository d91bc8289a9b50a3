"""The memory's vital signs: a few numbers that tell, while a model trains, whether its exact cache lives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hola_jax.array_types import Array, Float, Int
from hola_jax.layers.hola import HOLA
from hola_jax.memory import hola_memory
from hola_jax.model import Block, LanguageModel


def vital_signs(model: LanguageModel, tokens: Int[Array, "B T"]) -> dict[str, Float[Array, ""]]:
    """Means over layers, heads and rows, of a model whose mixer is HOLA; each row is read as one document.

    gate            sigmoid of the gate: how much of the cache's answer reaches the output
    null_sink_mass  share of a read that goes to the null sink, at the first token behind the last whole block; not
                    told where scores weigh reads, `read_power`
    cached_age      tokens since a retained token was seen
    cache_filled    share of the cache's rows that hold a token
    cache_replaced  share of the held tokens that the last whole block brought

    All but the gate need two whole blocks and one more token, and are left out of shorter rows.
    """
    config = model.config
    if config.mixer != "hola":
        raise ValueError(
            f"the model's mixer is {config.mixer!r}; vital signs are those of an exact cache, mixer 'hola'"
        )
    signs = {"gate": jnp.mean(jax.nn.sigmoid(model.blocks.mixer.cache.gate_logit[...]))}
    block = config.memory.block
    end = (tokens.shape[1] - 1) // block * block
    if end < 2 * block or not config.memory.window:
        return signs
    _, before = model.hidden(tokens[:, : end - block])
    _, state = model.hidden(tokens[:, end - block : end], state=before)
    positions = state.memory.cache_positions  # [N B H W]
    held = positions >= 0

    def mean_of_held(x: Array) -> Array:
        return jnp.sum(jnp.where(held, x, 0)) / jnp.maximum(jnp.sum(held), 1)

    if not config.memory.read_power:
        signs["null_sink_mass"] = jnp.mean(_sink_mass(model, tokens[:, end : end + 1], state))
    return signs | {
        "cached_age": mean_of_held((end - positions).astype(jnp.float32)),
        "cache_filled": jnp.mean(held.astype(jnp.float32)),
        "cache_replaced": mean_of_held((positions >= end - block).astype(jnp.float32)),
    }


def _sink_mass(model: LanguageModel, token: Int[Array, "B 1"], state: Any) -> Float[Array, "N B H"]:
    """What each layer's read of one more token gives to the null sink."""

    def noting(block: Block) -> Callable[[], Array]:
        mix, noted = block.mix, []

        def mixing(x: Array, segment_ids: Array | None, state: Any, sequence_axis: str | None) -> tuple[Array, Any]:
            noted.append(1 - _visible_mass(block.mixer, block.mixer_norm(x), state))
            return mix(x, segment_ids, state, sequence_axis)

        block.mix = mixing  # type: ignore[method-assign]
        return lambda: noted[0]

    mass: Array = model.watched(token, noting, state)[1]
    return mass


def _visible_mass(mixer: HOLA, x: Float[Array, "B 1 D"], state: Any) -> Float[Array, "B H"]:
    """Share of the read that goes to tokens: what is read when every value is one, nothing is in the state S, and the
    gate is open."""
    heads, key_heads = mixer.config.heads, mixer.config.key_head_count
    q, _ = mixer.query_conv(mixer.query(x), None, state.query)
    k, _ = mixer.key_conv(mixer.key(x), None, state.key)
    q, k = (part.astype(jnp.float32).reshape(*part.shape[:2], key_heads, -1) for part in (q, k))
    memory = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, state.memory)
    memory = dataclasses.replace(
        memory,
        fast_weights=jnp.zeros_like(memory.fast_weights),
        cache_values=jnp.ones_like(memory.cache_values),
        block_values=jnp.ones_like(memory.block_values),
    )
    nothing = jnp.zeros((*x.shape[:2], heads), jnp.float32)
    ones = jnp.ones((*x.shape[:2], heads, mixer.config.value_width), jnp.float32)
    params = mixer.cache.params()
    params = params._replace(gate_logit=jnp.full_like(params.gate_logit, jnp.inf))
    config = mixer.config.memory
    learned = nothing if config.score == "learned" else None
    out, _ = hola_memory(q, k, ones, nothing, nothing, params, config=config, state=memory, learned=learned)
    return out[:, 0, :, 0]
