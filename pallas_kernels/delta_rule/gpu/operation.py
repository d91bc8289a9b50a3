"""The public function: what it accepts, how it lays arrays out for the kernels, and how it is differentiated."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.delta_rule.chunk import CHUNK, EPSILON
from pallas_kernels.delta_rule.gpu import back, gradients, matrices, read, walk
from pallas_kernels.delta_rule.gpu.shapes import Call, Gates, from_chunks, gates, to_chunks
from pallas_kernels.delta_rule.operation import DeltaRule, refuse_shapes

WIDTHS = (64, 128, 256)
OUT_DTYPES = ("bfloat16", "float32")


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array,
    *,
    scale: float,
    normalise: bool = False,
    documents: jax.Array | None = None,
    initial: jax.Array | None = None,
    initial_document: jax.Array | None = None,
    magnitude: Literal["surprise", "residual"] | None = None,
    out_dtype: Any = None,
    interpret: Any = None,
) -> DeltaRule:
    """Outputs, write magnitudes and the final state of any number of tokens.

    The contract is `pallas_kernels.delta_rule.delta_rule`'s, for bfloat16 q, k and v. `interpret` is
    plgpu.InterpretGPUParams where there is no GPU.
    """
    _refuse(q, k, v, log_decay, out_dtype)
    refuse_shapes(q, k, v, beta, log_decay, documents, initial, initial_document, magnitude)
    batch, length, heads, value_dim = v.shape
    if magnitude == "residual":
        beta = jnp.maximum(beta, 1e-30)  # e = write / beta needs a write: one too small to be seen in S
    if documents is not None:
        log_decay = jnp.where(documents[..., None] > 0, log_decay, 0.0)
    tail = -length % CHUNK
    call = Call(
        batch=batch,
        chunks=(length + tail) // CHUNK,
        heads=heads,
        key_heads=k.shape[2],
        key_dim=k.shape[3],
        value_dim=value_dim,
        scale=scale,
        normalise=normalise,
        out_dtype=jnp.dtype(v.dtype if out_dtype is None else out_dtype),
        interpret=interpret or None,
    )
    empty = jnp.zeros(call.state().shape, jnp.float32)
    state = empty if initial is None else initial.astype(jnp.float32).swapaxes(2, 3)
    before = jnp.zeros(batch, jnp.int32) if initial_document is None else initial_document
    q, k, v = (_to_rows(x, tail) for x in (q, k, v))
    out, squares, final = _apply(call, Operands(q, k, v, gates(beta, log_decay, documents, before, tail), state))
    score = None
    if magnitude is not None:
        score = lax.stop_gradient(from_chunks(jnp.sqrt(jnp.sum(squares, axis=3)), length))
        score = score if magnitude == "surprise" else score / lax.stop_gradient(jnp.where(beta > 0, beta, 1.0))
    return DeltaRule(out.reshape(batch, -1, heads, value_dim)[:, :length], score, final.swapaxes(2, 3))


class Operands(NamedTuple):
    """What the kernels start from."""

    q: jax.Array  # [B, T, h * K]
    k: jax.Array  # [B, T, h * K]
    v: jax.Array  # [B, T, H * V]
    gates: Gates
    initial: jax.Array  # [B, H, V, K]


class Saved(NamedTuple):
    """What the backward pass starts from beside the operands."""

    attend: jax.Array  # [B, H, n, c, c] bfloat16
    inverse: jax.Array
    writes: jax.Array  # [B, T, H * V] bfloat16
    before: jax.Array  # [B, H, n, V, K] bfloat16


def _to_rows(x: jax.Array, tail: int) -> jax.Array:
    """[B, T, heads, X] as [B, T + tail, heads * X]."""
    x = jnp.pad(x, [(0, 0), (0, tail), (0, 0), (0, 0)]) if tail else x
    return x.reshape(*x.shape[:2], -1)


def _norms(call: Call, x: jax.Array) -> jax.Array:
    """[B, T, h, 1]: what normalises each key or query, of [B, T, h * K]."""
    x = x.astype(jnp.float32).reshape(call.batch, call.length, call.key_heads, call.key_dim)
    if not call.normalise:
        return jnp.ones((*x.shape[:3], 1), jnp.float32)
    return lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPSILON)


def _factors(call: Call, norms: jax.Array) -> jax.Array:
    """Those factors for each value head's chunks, [B, H, n, c]."""
    return jnp.repeat(to_chunks(norms[..., 0], 0), call.group, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(call: Call, operands: Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _forward(call, operands, save=False)[0]


def _query_key_factors(call: Call, given: Operands) -> tuple[jax.Array, jax.Array]:
    return _factors(call, _norms(call, given.q)) * call.scale, _factors(call, _norms(call, given.k))


def _forward(call: Call, given: Operands, save: bool) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Saved]:
    gate, queries, keys = given.gates, *_query_key_factors(call, given)
    document = jnp.broadcast_to(gate.document[:, None], keys.shape)
    rows = jnp.stack([gate.coarse, gate.fine, document, gate.beta, keys, queries], axis=3)
    made = matrices.run(call, given.q, given.k, rows, save)
    keep = jnp.broadcast_to(gate.keep[..., None], keys.shape)
    rows = jnp.stack([keys * gate.entering, keys * gate.leaving, keep], axis=3)
    walked = walk.run(call, given.k, given.v, made, rows, given.initial)
    out = read.run(call, given.q, walked.before, walked.writes, made.attend, queries * gate.entering)
    return (out, walked.squares, walked.final), Saved(made.attend, made.inverse, walked.writes, walked.before)


def _apply_forward(call: Call, operands: Operands) -> tuple[Any, Any]:
    results, saved = _forward(call, operands, save=True)
    return results, (operands, saved)


def _apply_backward(call: Call, saved: Any, cotangents: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Operands]:
    (given, kept), (d_out, _, d_final) = saved, cotangents
    gate, queries, keys = given.gates, *_query_key_factors(call, given)
    keep = jnp.broadcast_to(gate.keep[..., None], keys.shape)
    enters = keys * gate.entering * gate.beta
    rows = jnp.stack([keys * gate.leaving, queries * gate.entering, enters, keep], axis=3)
    d_out = d_out.astype(jnp.bfloat16)
    walked = back.run(call, given.q, given.k, d_out, kept.attend, kept.inverse, rows, d_final)
    tokens = given.q, given.k, given.v, kept.writes, d_out, walked.d_rest
    found = gradients.run(call, tokens, (kept.before, walked.d_after), gate, queries, keys)
    d_q, d_k = (
        gradients.through_norm(call, raw, gradient, _norms(call, raw)).astype(raw.dtype)
        for raw, gradient in ((given.q, found.q), (given.k, found.k))
    )
    return (Operands(d_q, d_k, found.v.astype(given.v.dtype), found.gates, walked.d_initial),)


_apply.defvjp(_apply_forward, _apply_backward)


def _refuse(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, out_dtype: Any) -> None:
    """Says what cannot run before anything is compiled."""
    if log_decay.ndim == 4:
        raise NotImplementedError(
            "the Mosaic GPU delta rule takes one decay per token and head, not one per key channel"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype.name != "bfloat16":
            raise NotImplementedError(f"{name} is {x.dtype}; the Mosaic GPU delta rule takes bfloat16")
    for name, width in (("K", k.shape[3]), ("V", v.shape[3])):
        if width not in WIDTHS:
            raise NotImplementedError(f"{name} is {width}; the Mosaic GPU delta rule takes 64, 128 or 256")
    if out_dtype is not None and jnp.dtype(out_dtype).name not in OUT_DTYPES:
        raise NotImplementedError(f"out_dtype is {out_dtype}; the Mosaic GPU delta rule writes bfloat16 or float32")
