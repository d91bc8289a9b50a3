"""Softmax attention of the Transformer baseline, with rotary positions and a key-value cache as its state.

The only mixer whose state grows with what it can hold: `max_length` tokens. Positions count real tokens, and a token's
place in the cache is its position, so padding takes no room and rows of a batch may stand at different positions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental import checkify

from hola_jax.array_types import Array, Bool, Float, Int, Int32
from hola_jax.config import ModelConfig
from hola_jax.layers.init import named_key
from hola_jax.layers.linear import Linear
from hola_jax.layers.norm import RMSNorm
from hola_jax.memory import poison, validate


class KeyValueState(NamedTuple):
    """All tokens of a prefix, each at its position; S = max_length."""

    keys: Float[Array, "B S h K"]  # rotated
    values: Float[Array, "B S h K"]
    documents: Int32[Array, "B S"]  # 0 where there was no token yet
    position: Int32[Array, " B"]  # real tokens seen so far
    spoilt: Bool[Array, " B"]  # whether the last document held NaN or inf, which keys and values then lack


def rotate(x: Float[Array, "B T H K"], positions: Int32[Array, "B T"], theta: float) -> Float[Array, "B T H K"]:
    """Each pair of channels (i, i + K/2) turned by its position times theta ** (-2 i / K)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)


class Tokens(NamedTuple):
    """What a state does not hold yet: keys, values and where they stand; of this device, or of all along the sequence's
    axis."""

    keys: Array
    values: Array
    documents: Int32[Array, "B T"]
    positions: Int32[Array, "B T"]
    spoilt: Bool[Array, "B T"]  # by NaN or inf, which keys and values lack: by their own, then by that of earlier ones


class Attention(nnx.Module):
    """Causal softmax attention inside each document."""

    def __init__(self, config: ModelConfig, key: Array) -> None:
        keys, values = config.key_head_count * config.key_width, config.heads * config.value_width
        self.config = config
        self.query = Linear(config.dim, values, named_key(key, "query"))
        self.key = Linear(config.dim, keys, named_key(key, "key"))
        self.value = Linear(config.dim, keys, named_key(key, "value"))
        self.output = Linear(values, config.dim, named_key(key, "output"))
        by_heads = config.qk_norm == "heads"
        self.query_norm = RMSNorm(config.key_width, config.norm_epsilon) if by_heads else None
        self.key_norm = RMSNorm(config.key_width, config.norm_epsilon) if by_heads else None

    @staticmethod
    def init_state(config: ModelConfig, batch: int) -> KeyValueState:
        """What an empty prefix leaves."""
        rows = (batch, config.max_length, config.key_head_count, config.key_width)
        empty = jnp.zeros(rows, config.compute_dtype)
        documents = jnp.zeros(rows[:2], jnp.int32)
        return KeyValueState(empty, empty, documents, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: KeyValueState | None = None,
        *,
        sequence_axis: str | None = None,
        values_of: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValueState]:
        y, tokens = self.answer(x, segment_ids, state, sequence_axis=sequence_axis, values_of=values_of)
        return y, self.commit(self.init_state(self.config, x.shape[0]) if state is None else state, tokens)

    def answer(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: KeyValueState | None = None,
        *,
        sequence_axis: str | None = None,
        values_of: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Tokens]:
        """The output, and the tokens that `commit` adds to the state: the state itself is only read. Values are made of
        `values_of` where it is given, and of x otherwise."""
        batch, length, _ = x.shape
        fresh = state is None
        state = self.init_state(self.config, batch) if state is None else state
        self._check(segment_ids, state, length)
        document = jnp.max(state.documents, axis=1)
        if segment_ids is None:
            documents = jnp.broadcast_to(jnp.maximum(document, 1)[:, None], (batch, length))
        else:
            documents = segment_ids.astype(jnp.int32)
        count = jnp.cumsum(documents > 0, axis=1, dtype=jnp.int32)
        start = state.position
        if sequence_axis is not None:
            counts = lax.all_gather(count[:, -1], sequence_axis)
            earlier = jnp.arange(counts.shape[0])[:, None] < lax.axis_index(sequence_axis)
            start = start + jnp.sum(jnp.where(earlier, counts, 0), axis=0)
        positions = start[:, None] + count - 1

        q, tokens = self.project(x, x if values_of is None else values_of, documents, positions)
        offset = jnp.zeros((), jnp.int32)
        if sequence_axis is not None:
            gathered = [lax.all_gather(part, sequence_axis, axis=1, tiled=True) for part in tokens]
            tokens, offset = Tokens(*gathered), lax.axis_index(sequence_axis) * length
        several = segment_ids is not None
        spoilt = poison.spoilt_since(
            tokens.spoilt[..., None], tokens.documents if several else None, state.spoilt[:, None], document
        )[..., 0]
        tokens = tokens._replace(spoilt=spoilt)
        mask = None
        if several or sequence_axis is not None or not fresh:
            mask = (positions[:, :, None] >= tokens.positions[:, None]) & (
                documents[:, :, None] == tokens.documents[:, None]
            )
        if fresh:
            o = self._attend(q, tokens.keys, tokens.values, mask)
        else:
            assert mask is not None
            o = behind(q, state, state.documents[:, None] == documents[:, :, None], tokens, mask)
        spoilt = lax.dynamic_slice_in_dim(spoilt, offset, length, axis=1)
        beyond = positions >= self.config.max_length  # no room: loud where it cannot be an error
        o = poison.spoil(o, (spoilt | beyond) & (documents > 0))
        return self.output(o.reshape(batch, length, -1)), tokens

    @staticmethod
    def commit(state: KeyValueState, tokens: Tokens) -> KeyValueState:
        """The state with the real tokens at their positions. All layers' at once as well as one's: then both have an axis
        in front, and nothing but the tokens is written."""
        real = tokens.documents > 0
        place = jnp.where(real, tokens.positions, state.documents.shape[-1])
        place = place.reshape(-1, *place.shape[-2:])[0]  # every layer's are alike
        row = jnp.arange(place.shape[0])[:, None]
        keys, values = tokens.keys.astype(state.keys.dtype), tokens.values.astype(state.values.dtype)
        return KeyValueState(
            state.keys.at[..., row, place, :, :].set(keys, mode="drop"),
            state.values.at[..., row, place, :, :].set(values, mode="drop"),
            state.documents.at[..., row, place].set(tokens.documents, mode="drop"),
            state.position + jnp.sum(real, axis=-1, dtype=jnp.int32),
            tokens.spoilt[..., -1],
        )

    def _check(self, segment_ids: Array | None, state: KeyValueState, length: int) -> None:
        capacity = self.config.max_length
        if length > capacity:
            raise ValueError(
                f"x has {length} tokens and ModelConfig.max_length is {capacity}; raise max_length or give fewer tokens"
            )
        if self.config.implementation not in (None, "xla"):
            raise NotImplementedError(
                f"implementation={self.config.implementation!r}: softmax attention is jax.nn.dot_product_attention; "
                "use None or 'xla'"
            )
        if self.config.check:
            document = jnp.max(state.documents, axis=1)
            validate.segment_values(segment_ids, document)
            real = length if segment_ids is None else jnp.sum(segment_ids > 0, axis=1)
            checkify.check(
                jnp.all(state.position + real <= capacity),
                "the state has no room for these tokens; raise ModelConfig.max_length",
            )

    def project(
        self, x: Array, values_of: Array, documents: Array, positions: Array
    ) -> tuple[Float[Array, "B T H K"], Tokens]:
        """Queries, and keys and values without NaN and inf."""
        config = self.config

        def heads(x: Array, count: int, norm: RMSNorm | None) -> Array:
            x = x.reshape(*x.shape[:2], count, -1)
            return x if norm is None else norm(x)

        q = rotate(heads(self.query(x), config.heads, self.query_norm), positions, config.rope_theta)
        k = rotate(heads(self.key(x), config.key_head_count, self.key_norm), positions, config.rope_theta)
        v = heads(self.value(values_of), config.key_head_count, None)
        bad = poison.not_finite(k) | poison.not_finite(v)
        k, v = poison.cleaned(k, bad), poison.cleaned(v, bad)
        return q, Tokens(k, v, documents, positions, jnp.any(bad, axis=-1) & (documents > 0))

    def _attend(
        self, q: Array, keys: Array, values: Array, mask: Bool[Array, "B T S"] | None
    ) -> Float[Array, "B T H K"]:
        return jax.nn.dot_product_attention(
            q,
            keys,
            values,
            mask=None if mask is None else mask[:, None],
            is_causal=mask is None,
            implementation="xla" if self.config.implementation == "xla" else None,
        )


def behind(
    q: Float[Array, "B T H K"],
    state: KeyValueState,
    stored: Bool[Array, "B T S"],
    tokens: Tokens,
    new: Bool[Array, "B T U"],
) -> Float[Array, "B T H K"]:
    """Attention over the state and the new tokens, as far as the two masks let it look.

    In two parts under one softmax: to put the tokens into the state first would copy it, once a layer and token.
    """
    groups = tokens.keys.shape[2]
    q = q.reshape(*q.shape[:2], groups, -1, q.shape[-1])
    masks, keys = jnp.concatenate([stored, new], axis=-1), (state.keys, tokens.keys.astype(state.keys.dtype))
    logits = [jnp.einsum("bthgk,bshk->bhgts", q, k, preferred_element_type=jnp.float32) for k in keys]
    scaled = jnp.concatenate(logits, axis=-1) * q.shape[-1] ** -0.5
    share = jax.nn.softmax(jnp.where(masks[:, None, None], scaled, -1e30)).astype(state.values.dtype)
    parts = jnp.split(share, [stored.shape[-1]], axis=-1)
    values = (state.values, tokens.values.astype(state.values.dtype))
    old, own = (
        jnp.einsum("bhgts,bshk->bthgk", p, v, preferred_element_type=jnp.float32)
        for p, v in zip(parts, values, strict=True)
    )
    return (old + own).reshape(*q.shape[:2], -1, q.shape[-1]).astype(q.dtype)
