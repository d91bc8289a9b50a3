"""The two compiled programs of inference: read a piece of a prompt, write some tokens.

Both are jitted once for the whole process and keyed by the model's structure, so a second generator, or a second call,
compiles nothing that the first one did.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from hola_jax.array_types import Array, Int32
from hola_jax.inference.prefix import Memory
from hola_jax.inference.sampling import Settings, choose
from hola_jax.model import LanguageModel, Params

NOTHING, NOT_FINITE = -1, -2  # in the place of a token: the row has ended; its logits are NaN or infinite
Structure = nnx.GraphDef[LanguageModel]
LOWERED = ("kernel", "embedding")  # what every layer turns into the activations' type before its use


@partial(jax.jit, static_argnums=0)
def _lowered(dtype: Any, params: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(dtype), params)


def for_inference(params: Params, dtype: Any) -> Params:
    """The parameters with matrices in the type of the activations, to which each use would turn them: half the bytes to
    read for a token, and the same numbers."""
    found: Params = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            found[name] = for_inference(dict(value), dtype)
        elif name in LOWERED and value.dtype != dtype:
            found[name] = _lowered(dtype, value)
        else:
            found[name] = value
    return found


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def read(
    structure: Structure, params: Params, tokens: Int32[Array, "B T"], count: Int32[Array, " B"], memory: Memory
) -> Memory:
    """The memory after the first `count` tokens of each row; what stands behind them is padding."""
    model = nnx.merge(structure, params)
    rows, length = jnp.arange(tokens.shape[0]), tokens.shape[1]
    real = jnp.arange(length) < count[:, None]
    hidden, state = model.hidden(tokens, real.astype(jnp.int32), memory.state)
    logits = model.head(hidden[rows, jnp.maximum(count - 1, 0)])
    seen = memory.seen.at[rows[:, None], jnp.where(real, tokens, memory.seen.shape[1])].set(True, mode="drop")
    logits = jnp.where((count > 0)[:, None], logits, memory.logits)
    return Memory(state, logits, seen, memory.position + count)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def write(
    structure: Structure,
    steps: int,
    params: Params,
    memory: Memory,
    settings: Settings,
    left: Int32[Array, " B"],
    stops: Int32[Array, "B M"],
) -> tuple[Int32[Array, "S B"], Memory, Int32[Array, " B"]]:
    """At most S = `steps` tokens of each row: (tokens, the memory after them, tokens that each row may still write).

    A row ends when it has none left or writes one of its `stops`, which its memory does not read. Rows that ended change
    nothing; the loop ends with the last row.
    """
    model = nnx.merge(structure, params)
    width = left.shape[0]
    rows = jnp.arange(width)

    def going(carry: tuple[Array, Array, Memory, Array]) -> Array:
        step, _, _, left = carry
        return (step < steps) & jnp.any(left > 0)

    def token(carry: tuple[Array, Array, Memory, Array]) -> tuple[Array, Array, Memory, Array]:
        step, tokens, memory, left = carry
        finite = jnp.all(jnp.isfinite(memory.logits), axis=-1)
        chosen = choose(memory.logits, memory.seen, memory.position, settings)
        ended = jnp.any(chosen[:, None] == stops, axis=-1) | ~finite
        live = (left > 0) & ~ended
        hidden, state = model.hidden(chosen[:, None], live[:, None].astype(jnp.int32), memory.state)
        logits = jnp.where(live[:, None], model.head(hidden[:, 0]), memory.logits)
        seen = memory.seen.at[rows, jnp.where(live, chosen, memory.seen.shape[1])].set(True, mode="drop")
        written = jnp.where(left > 0, jnp.where(finite, chosen, NOT_FINITE), NOTHING)
        after = Memory(state, logits, seen, memory.position + live)
        return step + 1, tokens.at[step].set(written), after, jnp.where(live, left - 1, 0)

    start = (jnp.zeros((), jnp.int32), jnp.full((steps, width), NOTHING, jnp.int32), memory, left)
    _, tokens, memory, left = lax.while_loop(going, token, start)
    return tokens, memory, left
