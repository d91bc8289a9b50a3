"""GSA's memory: M slots per head, each a key and a value that forget together; a query reads them by a softmax.

    K~_t = Diag(exp f_t) K~_{t-1} + s_t k_t',    V~_t = Diag(exp f_t) V~_{t-1} + s_t v_t',    s_t = 1 - exp f_t
    p_t = softmax(K~_t q_t),    o_t = V~_t' p_t

Both are states of `diagonal`. The second is read along the slots, as gated linear attention is with query p; the first is
read along the key's channels, so that its decays stay with the output.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hola_jax.array_types import Array, Float, Int32
from hola_jax.memory import kernels, poison, validate
from hola_jax.memory.decay import DocumentMasks, decayed_products, decayed_sums, decays
from hola_jax.memory.delta_rule import HIGHEST, choose_scan, from_chunks
from hola_jax.memory.diagonal import Element, States, chunked, run_chunks
from hola_jax.memory.linear import documents_around, documents_of
from hola_jax.memory.reference_linear import slot_reference

Slots = tuple[Float[Array, "B H M K"], Float[Array, "B H M V"]]  # keys and values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
    """All that a layer of slots remembers of a prefix."""

    keys: Float[Array, "B H M K"]  # K~, float32
    values: Float[Array, "B H M V"]  # V~, float32
    document: Int32[Array, " B"]  # segment id of the last real token; 0 before any


def init_slot_state(batch: int, heads: int, slots: int, key_dim: int, value_dim: int) -> SlotState:
    """The memory of an empty prefix."""
    return SlotState(
        jnp.zeros((batch, heads, slots, key_dim), jnp.float32),
        jnp.zeros((batch, heads, slots, value_dim), jnp.float32),
        jnp.zeros(batch, jnp.int32),
    )


def slot_memory(
    q: Array,
    k: Array,
    v: Array,
    log_forget: Array,
    *,
    chunk: int = 64,
    segment_ids: Array | None = None,
    state: SlotState | None = None,
    implementation: kernels.Implementation | None = None,
    check: bool = False,
    sequence_axis: str | None = None,
) -> tuple[Array, SlotState]:
    """What the slots answer to each token, and the slots after the last: ([B, T, H, V] in v's type, SlotState).

    q, k [B, T, h, K] and v [B, T, H, V] come after SiLU; h key heads serve H value heads. log_forget [B, T, H, M] is at
    most 0: a slot keeps exp of it and takes the rest from the token. Any T >= 1. The other arguments are as in
    `linear_memory`.
    """
    _check_tokens(q, k, v, log_forget)
    batch, length, heads, value_dim = v.shape
    slots, key_dim = log_forget.shape[3], k.shape[3]
    validate.segments(segment_ids, batch, length)
    validate.chunks(chunk, "auto")
    chosen = kernels.choose(implementation, kernels.work_of(q, k, v, delta=False), sequence_axis).name
    fresh = state is None
    if state is None:
        state = init_slot_state(batch, heads, slots, key_dim, value_dim)
    sizes = {"keys": (batch, heads, slots, key_dim), "values": (batch, heads, slots, value_dim), "document": (batch,)}
    validate.check_state(state, SlotState, "init_slot_state", sizes)
    if check:
        if jnp.size(log_forget):
            validate.decay_values(None, log_forget)
        validate.segment_values(segment_ids, None if fresh else state.document)

    several, documents, document = documents_of(segment_ids, state.document, length)
    given = (state.keys, state.values)
    clear = poison.cleared(q, k, v, (log_forget,), given, several, document, sequence_axis, fresh=fresh)
    before, last = documents_around(documents, document, sequence_axis)
    (log_forget,), (slot_keys, slot_values) = clear.gates, clear.states
    q, k, values, states = clear.q, clear.k, clear.v, (slot_keys, slot_values)
    if chosen == "reference":
        out, states = slot_reference(q, k, values, log_forget, documents, states, before)
    elif length == 1 and not fresh and sequence_axis is None:
        out, states = _token(q, k, values, log_forget, documents[:, 0], states, before)
    else:
        out, states = _piece(q, k, values, log_forget, chunk, several, states, before, sequence_axis)
    out = poison.spoil(out, clear.spoilt).astype(v.dtype)
    keys, values = (poison.spoil(x, clear.spoilt_last) for x in states)
    return out, SlotState(keys, values, last)


def _check_tokens(q: Array, k: Array, v: Array, log_forget: Array) -> None:
    validate.qkv(q, k, v, None, v[..., 0] if getattr(v, "ndim", 0) == 4 else v)  # there is no log_decay to look at
    if not hasattr(log_forget, "dtype") or not jnp.issubdtype(log_forget.dtype, jnp.floating):
        given = getattr(log_forget, "dtype", type(log_forget).__name__)
        raise TypeError(f"log_forget is {given}; it must be an array in floating point (float32, bfloat16, ...)")
    if log_forget.ndim != 4 or log_forget.shape[:3] != v.shape[:3] or log_forget.shape[3] < 1:
        raise ValueError(
            f"log_forget has shape {tuple(log_forget.shape)}; with v {tuple(v.shape)} it must be [B T H M] = "
            f"({', '.join(map(str, v.shape[:3]))}, M) with at least one slot (M)"
        )


class _Chunk(NamedTuple):
    q: Float[Array, "... c K"]
    k: Float[Array, "... c K"]
    v: Float[Array, "... c V"]
    log_forget: Float[Array, "... c M"]
    masks: DocumentMasks | None


def _summarise(chunk: _Chunk) -> Element:
    decay = decays(chunk.log_forget, chunk.masks)
    writes = -jnp.expm1(chunk.log_forget) * decay.leaving
    added = (jnp.einsum("...cm,...cx->...mx", writes, x, precision=HIGHEST) for x in (chunk.k, chunk.v))
    return Element(decay.keep, tuple(added))


def _read(chunk: _Chunk, states: States) -> Float[Array, "... c V"]:
    keys, values = states
    decay = decays(chunk.log_forget, chunk.masks)
    strength = -jnp.expm1(chunk.log_forget)
    pairs = jnp.einsum("...ik,...jk->...ij", chunk.q, chunk.k, precision=HIGHEST)
    logits = jnp.einsum("...ik,...mk->...im", chunk.q, keys, precision=HIGHEST) * decay.entering
    weights = jax.nn.softmax(logits + decayed_sums(pairs, strength, decay), axis=-1)
    attend = decayed_products(weights, strength, decay.total, decay.causal)
    seen = jnp.matmul(weights * decay.entering, values, precision=HIGHEST)
    return seen + jnp.matmul(attend, chunk.v, precision=HIGHEST)


def _piece(
    q: Float[Array, "B T h K"],
    k: Float[Array, "B T h K"],
    v: Float[Array, "B T H V"],
    log_forget: Float[Array, "B T H M"],
    chunk: int,
    documents: Int32[Array, "B T"] | None,
    initial: Slots,
    document: Int32[Array, " B"],
    axis: str | None,
) -> tuple[Float[Array, "B T H V"], Slots]:
    """Any number of tokens at once."""
    (batch, length, heads, _), key_heads = v.shape, k.shape[2]
    (q, k, v, log_forget), masks = chunked((q, k, v, log_forget), key_heads, chunk, documents, document)
    states = tuple(x.reshape(batch, key_heads, heads // key_heads, *x.shape[2:]) for x in initial)
    chunks = _Chunk(q, k, v, log_forget, masks)
    out, final = run_chunks(_summarise, _read, chunks, states, choose_scan("auto"), axis)
    keys, values = (x.reshape(batch, heads, *x.shape[3:]) for x in final)
    return from_chunks(out, length), (keys, values)


def _token(
    q: Float[Array, "B 1 h K"],
    k: Float[Array, "B 1 h K"],
    v: Float[Array, "B 1 H V"],
    log_forget: Float[Array, "B 1 H M"],
    here: Int32[Array, " B"],
    states: Slots,
    document: Int32[Array, " B"],
) -> tuple[Float[Array, "B 1 H V"], Slots]:
    """One token of every row: the decoding path; padding changes nothing."""
    group = v.shape[2] // k.shape[2]
    q, k, v, log_forget = (x[:, 0].astype(jnp.float32) for x in (q, k, v, log_forget))
    q, k = jnp.repeat(q, group, axis=1), jnp.repeat(k, group, axis=1)
    stays, real = (x[:, None, None, None] for x in (here == document, here > 0))
    keep, write = jnp.exp(log_forget)[..., None], -jnp.expm1(log_forget)[..., None]
    keys, values = (
        keep * jnp.where(stays, state, 0.0) + write * x[:, :, None] for state, x in zip(states, (k, v), strict=True)
    )
    weights = jax.nn.softmax(jnp.einsum("bhk,bhmk->bhm", q, keys, precision=HIGHEST), axis=-1)
    out = jnp.einsum("bhm,bhmv->bhv", weights, values, precision=HIGHEST)
    after = jnp.where(real, keys, states[0]), jnp.where(real, values, states[1])
    return jnp.where(real[..., 0], out, 0.0)[:, None], after
