"""The public function: what it accepts, how it lays arrays out for the kernels, and how it is differentiated."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.delta_rule import backward, forward, layout
from pallas_kernels.delta_rule.chunk import CHUNK, RUN
from pallas_kernels.delta_rule.layout import Call, Operands

WIDTHS = (64, 128, 256)
DTYPES = ("bfloat16", "float32")


class DeltaRule(NamedTuple):
    """What the state answers, how much was written, and the state afterwards."""

    out: jax.Array  # [B, T, H, V]
    magnitude: jax.Array | None  # [B, T, H] float32: beta |e| or |e|; no gradient flows through it
    final: jax.Array  # [B, H, K, V] float32


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
    interpret: Any = False,
) -> DeltaRule:
    """Outputs, write magnitudes and the final state of any number of tokens.

    q, k [B, T, h, K], v [B, T, H, V], beta and log_decay [B, T, H]; h divides H. Keys and queries come normalised, or
    `normalise` divides them by sqrt(|x|^2 + 1e-6) in float32 on the chip. `documents` [B, T] gives each token's id, 0
    for padding, not decreasing along a row; the state starts anew with each. A state given as `initial` [B, H, K, V]
    belongs to `initial_document` [B] (0: to none). `out_dtype` is v's where not given;
    `interpret` is True, or pltpu.InterpretParams, where there is no TPU. NaN and inf in a token, or in `initial`, make
    NaN of what follows in their document, the final state too where it is that document's, and touch nothing else.
    """
    _refuse(q, k, v, log_decay, interpret)
    refuse_shapes(q, k, v, beta, log_decay, documents, initial, initial_document, magnitude)
    batch, length, heads, value_dim = v.shape
    key_heads, key_dim = k.shape[2:]
    beta, log_decay = layout.finite_gates(beta, log_decay)
    if magnitude == "residual":
        beta = jnp.maximum(beta, 1e-30)  # e = write / beta needs a write: one too small to be seen in S
    if documents is not None:
        real = documents[..., None] > 0
        beta, log_decay = jnp.where(real, beta, 0.0), jnp.where(real, log_decay, 0.0)
    tail = -length % (RUN * CHUNK)
    call = Call(
        batch=batch,
        chunks=(length + tail) // CHUNK,
        heads=heads,
        key_heads=key_heads,
        key_dim=layout.whole_lanes(key_dim),
        value_dim=layout.whole_lanes(value_dim),
        scale=scale,
        normalise=normalise,
        out_dtype=jnp.dtype(v.dtype if out_dtype is None else out_dtype),
        interpret=interpret,
    )
    if initial is None:
        initial = jnp.zeros(call.state_shape, jnp.float32)
    else:
        widths = (0, call.key_dim - key_dim), (0, call.value_dim - value_dim)
        initial = jnp.pad(initial.astype(jnp.float32), [(0, 0), (0, 0), *widths])
    rows = None
    if documents is not None:
        before = jnp.zeros(batch, jnp.int32) if initial_document is None else initial_document
        rows = layout.document_rows(documents, before, tail)
    q, k, v = (layout.to_lanes(x, tail) for x in (q, k, v))
    out, norms, final = _apply(call, Operands(q, k, v, layout.gate_rows(beta, log_decay, tail), initial, rows))
    score = None
    if magnitude is not None:
        score = lax.stop_gradient(layout.from_rows(norms, length))
        score = score if magnitude == "surprise" else score / lax.stop_gradient(jnp.where(beta > 0, beta, 1.0))
    return DeltaRule(layout.from_lanes(out, length, heads, value_dim), score, final[..., :key_dim, :value_dim])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(call: Call, operands: Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
    return forward.run(call, operands, save=False)[:3]


def _apply_forward(
    call: Call, operands: Operands
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[Operands, jax.Array, jax.Array]]:
    """Kept for the backward pass: the operands, the state before each grid step and which outputs are NaN; all else is
    made again."""
    out, norms, final, before, marks = forward.run(call, operands, save=True)
    return (out, norms, final), (operands, before, marks)


def _apply_backward(
    call: Call, saved: tuple[Operands, jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[Operands]:
    (operands, before, marks), (d_out, _, d_final) = saved, cotangents
    return (backward.run(call, operands, backward.Upstream(before, marks, d_out, d_final)),)


_apply.defvjp(_apply_forward, _apply_backward)


def _refuse(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, interpret: Any) -> None:
    """Says what cannot run before anything is compiled."""
    if log_decay.ndim == 4:
        raise NotImplementedError("the Pallas delta rule takes one decay per token and head, not one per key channel")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype.name not in DTYPES:
            raise NotImplementedError(f"{name} is {x.dtype}; the Pallas delta rule takes bfloat16 and float32")
    for name, width in (("K", k.shape[3]), ("V", v.shape[3])):
        if width not in WIDTHS and not interpret:
            raise NotImplementedError(f"{name} is {width}; the Pallas delta rule takes 64, 128 or 256")


def refuse_shapes(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array,
    documents: jax.Array | None,
    initial: jax.Array | None,
    initial_document: jax.Array | None,
    magnitude: str | None,
) -> None:
    """Says what does not fit together."""
    batch, length, heads, value_dim = v.shape
    if q.shape != k.shape or k.shape[:2] != (batch, length) or heads % k.shape[2]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit: want [B, T, h, K] twice and [B, T, H, V], h dividing H"
        )
    if length == 0:
        raise ValueError("the Pallas delta rule needs at least one token")
    _refuse_shape("beta", beta, (batch, length, heads))
    _refuse_shape("log_decay", log_decay, (batch, length, heads))
    _refuse_shape("documents", documents, (batch, length))
    _refuse_shape("initial", initial, (batch, heads, k.shape[3], value_dim))
    _refuse_shape("initial_document", initial_document, (batch,))
    if magnitude not in (None, "surprise", "residual"):
        raise ValueError(f'magnitude is {magnitude!r}, want "surprise", "residual" or None')


def _refuse_shape(name: str, x: jax.Array | None, shape: tuple[int, ...]) -> None:
    if x is not None and x.shape != shape:
        raise ValueError(f"{name} is {x.shape}, want {shape}")
