"""What is left of the backward pass when the walks are done: products of each chunk by itself, which XLA does in batches."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.delta_rule.chunk import CHUNK
from pallas_kernels.delta_rule.gpu.shapes import Call, Gates


class Chunks(NamedTuple):
    """Tokens by chunk and value head, [B, H, n, c, K or V] bfloat16."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    writes: jax.Array
    d_out: jax.Array
    d_rest: jax.Array


class Gradients(NamedTuple):
    q: jax.Array  # [B, T, h * K], the factors that normalise held
    k: jax.Array
    v: jax.Array  # [B, T, H * V]
    gates: Gates


def _chunks(call: Call, x: jax.Array, heads: int) -> jax.Array:
    x = x.reshape(call.batch, call.chunks, CHUNK, heads, -1).transpose(0, 3, 1, 2, 4)
    return jnp.repeat(x, call.heads // heads, axis=1)


def _tokens(call: Call, x: jax.Array, heads: int) -> jax.Array:
    """[B, H, n, c, X] as [B, T, heads * X], summed over the value heads of each."""
    x = x.reshape(call.batch, heads, -1, call.chunks, CHUNK, x.shape[-1]).sum(axis=2)
    return x.transpose(0, 2, 3, 1, 4).reshape(call.batch, call.length, -1)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _pair_decay(gate: Gates) -> jax.Array:
    """[B, H, n, c, c] exp(G_i - G_j) for j <= i of one document."""
    place = jnp.arange(CHUNK)
    seen = (place[:, None] >= place) & (gate.document[..., :, None] == gate.document[..., None, :])[:, None]
    coarse, fine = (x[..., :, None] - x[..., None, :] for x in (gate.coarse, gate.fine))
    return jnp.where(seen, jnp.exp(jnp.where(seen, coarse + fine, 0.0)), 0.0)


def run(
    call: Call,
    tokens: tuple[jax.Array, ...],
    states: tuple[jax.Array, jax.Array],
    gate: Gates,
    queries: jax.Array,
    keys: jax.Array,
) -> Gradients:
    """`tokens` are the fields of `Chunks` by token, `states` S before and its gradient behind each chunk; `queries` and
    `keys` [B, H, n, c] the factors of raw queries and keys."""
    heads = (call.key_heads,) * 2 + (call.heads,) * 4
    given = Chunks(*(_chunks(call, x, count) for x, count in zip(tokens, heads, strict=True)))
    before, d_after = states
    q, k = given.q.astype(jnp.float32), given.k.astype(jnp.float32)
    d_rest = given.d_rest.astype(jnp.float32)
    through = [
        _dot("bhncv,bhnvk->bhnck", x, s)
        for x, s in ((given.d_out, before), (given.d_rest, before), (given.writes, d_after))
    ]
    out_written, rest_written = (_dot("bhniv,bhnjv->bhnij", x, given.writes) for x in (given.d_out, given.d_rest))
    asked, similar = (_dot("bhnik,bhnjk->bhnij", x, given.k) for x in (given.q, given.k))

    decay = _pair_decay(gate) * keys[..., None, :]
    strict = jnp.tril(decay, -1) * keys[..., :, None]
    attend = out_written * decay * queries[..., :, None]
    lower = -rest_written * strict
    between = attend * asked + lower * similar * gate.beta[..., :, None]
    along = [jnp.sum(x * y, axis=-1) for x, y in zip(through, (q, k, k), strict=True)]
    predicts = keys * gate.entering

    reads = (queries * gate.entering)[..., None] * through[0]
    rest = (keys * gate.leaving)[..., None] * through[2] - (gate.beta * predicts)[..., None] * through[1]
    attend, weighed = (x.astype(jnp.bfloat16) for x in (attend, lower * gate.beta[..., :, None]))
    d_q = reads + _dot("bhnij,bhnjk->bhnik", attend, given.k)
    d_k = rest + _dot("bhnij,bhnik->bhnjk", attend, given.q)
    d_k = d_k + _dot("bhnij,bhnjk->bhnik", weighed, given.k) + _dot("bhnij,bhnik->bhnjk", weighed, given.k)
    return Gradients(
        q=_tokens(call, d_q, call.key_heads),
        k=_tokens(call, d_k, call.key_heads),
        v=_tokens(call, d_rest * gate.beta[..., None], call.heads),
        gates=Gates(
            beta=jnp.sum(d_rest * given.v, axis=-1) - predicts * along[1] + jnp.sum(lower * similar, axis=-1),
            coarse=jnp.zeros_like(gate.coarse),
            fine=jnp.sum(between, axis=-1) - jnp.sum(between, axis=-2),
            entering=queries * along[0] - gate.beta * keys * along[1],
            leaving=keys * along[2],
            keep=jnp.sum(before.astype(jnp.float32) * d_after, axis=(-1, -2)),
            document=jnp.zeros_like(gate.document),
        ),
    )


def through_norm(call: Call, raw: jax.Array, gradient: jax.Array, norms: jax.Array) -> jax.Array:
    """The gradient by keys or queries, from the one that holds the factors [B, T, h, 1] that normalise them."""
    shape = (call.batch, call.length, call.key_heads, call.key_dim)
    raw, gradient = (x.astype(jnp.float32).reshape(shape) for x in (raw, gradient))
    if call.normalise:
        gradient = gradient - raw * (lax.square(norms) * jnp.sum(raw * gradient, axis=-1, keepdims=True))
    return gradient.reshape(call.batch, call.length, -1)
