"""The public function: what it accepts, how it lays arrays out for the kernels, and how it is differentiated."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.cache.arrays import Cache, Rows
from pallas_kernels.cache.call import document_counts, empty_cache
from pallas_kernels.cache.limits import refuse_gradient
from pallas_kernels.delta_rule import layout as chunks
from pallas_kernels.delta_rule.chunk import CHUNK
from pallas_kernels.hola import backward, forward
from pallas_kernels.hola.layout import Call, Counts, Operands, Running
from pallas_kernels.hola.limits import too_large, unlike

LEAST = 1e-30  # e = write / beta needs a write: one too small to be seen in S


class Learned(NamedTuple):
    """What the read learns."""

    query_scale: Array  # [K] or [H, K], the softmax's temperature multiplied in
    key_scale: Array  # [K] or [h, K]
    sink_logit: Array  # [H]
    gate: Array  # [H]: what the read is multiplied by, in [0, 1]


class Earlier(NamedTuple):
    """What an earlier piece left. The running block stands in the first `fill` places."""

    state: Array  # [B, H, K, V] float32
    cache: Cache
    running_keys: Array  # [B, h, C, K], normalised, as stored
    running_values: Array  # [B, H, C, V]
    running_scores: Array  # [B, H, C]
    fill: Array  # [B] int32


class Hola(NamedTuple):
    """What the memory answers, and is afterwards."""

    out: Array  # [B, T, H, V]: scale * S'q + gate * read
    scores: Array  # [B, H, T] float32: what each place competes with; no gradient flows through it
    state: Array  # [B, H, K, V] float32: after the last token
    cache: Cache  # after the whole blocks


def fits(
    heads: int,
    key_heads: int,
    key_dim: int,
    value_dim: int,
    dtypes: tuple[Any, Any, Any],
    *,
    window: int,
    block: int,
    continued: bool = False,
    interpret: Any = False,
) -> str | None:
    """Why `hola` does not take such a memory, or None where it does. `dtypes` are those of q, k and v; `continued` where
    there is an `earlier` piece, whose running block needs room on the chip."""
    if reason := unlike(dtypes):
        return reason
    call = _call((1, block, heads, value_dim), (key_heads, key_dim), dtypes[2], window, block, interpret)
    return too_large(call, key_dim, value_dim, continued)


def _call(
    values: tuple[int, ...],
    keys: tuple[int, ...],
    dtype: Any,
    window: int,
    block: int,
    interpret: Any,
    scale: float = 1.0,
    read: str = "rmsnorm",
    residual: bool = False,
    energy: float | None = None,
) -> Call:
    """From the shape of v, [B, T, H, V], and how many key heads there are of which width."""
    (batch, length, heads, value_dim), (key_heads, key_dim) = values, keys
    return Call(
        batch=batch,
        heads=heads,
        key_heads=key_heads,
        blocks=max(1, -(-length // block)),
        block=block,
        chunk=max(c for c in range(1, min(block, CHUNK) + 1) if block % c == 0),
        window=window,
        key_dim=chunks.whole_lanes(key_dim),
        value_dim=chunks.whole_lanes(value_dim),
        scale=scale,
        share=1.0 / key_dim if read == "rmsnorm" else 1.0,
        residual=residual,
        dtype=jnp.dtype(dtype),
        energy=energy,
        interpret=interpret,
    )


def hola(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array,
    learned: Learned,
    earlier: Earlier | None = None,
    *,
    scale: float,
    window: int,
    block: int,
    score: Literal["surprise", "residual"] | Array = "surprise",
    read: Literal["rmsnorm", "unit_l2"] = "rmsnorm",
    energy: float | None = None,
    documents: Array | None = None,
    start: Array | None = None,
    whole: Array | None = None,
    interpret: Any = False,
) -> Hola:
    """The memory's answer to any number of tokens, with all between inputs and outputs on the chip.

    q, k [B, T, h, K] and v [B, T, H, V] come before any norm, in one type, bfloat16 or float32; beta, log_decay [B, T, H]; h
    divides H. The state sees q and k by their length, the read by `read`. Place 0 begins a block of `block` tokens; `start`
    [B] is its position, `whole` [B] how many blocks of a row are complete (T // C): the block behind them is read and does
    not compete for the `window` rows. `score` is the write's magnitude, beta |e| or |e|, or given for each place [B, H, T].
    `documents` [B, T] are ids that rise along T, 0 at padding; None where all tokens are real and of one document. NaN and
    inf in a token, or in an earlier state, make NaN of what follows in their document, the last state too where it is that
    document's, and touch nothing else. Places that `earlier` occupies hold zeros in q, k, v and the gates, and in
    `documents` the state's document where the token is still in sight, else 0. The gradient flows by everything but scores
    and choices; with `energy`, the share of its softmax weights that each read keeps (`pallas_kernels.cache`), by nothing.
    """
    _refuse(q, k, v, beta, log_decay, learned, earlier, score, read, documents)
    (_, length, heads, value_dim), key_dim = v.shape, k.shape[3]
    residual = isinstance(score, str) and score == "residual"
    call = _call(v.shape, k.shape[2:], v.dtype, window, block, interpret, scale, read, residual, energy)
    if reason := too_large(call, key_dim, value_dim, earlier is not None):
        raise NotImplementedError(reason)
    counts = _counts(call, length, documents, start, whole, earlier)
    given = _operands(call, q, k, v, beta, log_decay, learned, earlier, score, documents, counts)
    out, scores, state, rows = _hola(call, counts, given)
    document = jnp.take_along_axis(counts.documents, counts.whole[:, None], axis=1)[:, 0]
    kept_keys, kept_values = rows.keys[..., :key_dim], rows.values[..., :value_dim]
    return Hola(
        chunks.from_lanes(out, length, heads, value_dim),
        lax.stop_gradient(scores[:, :, 0, :length]),
        state[..., :key_dim, :value_dim],
        Cache(kept_keys, kept_values, rows.scores[:, :, 0], rows.positions[:, :, 0], document),
    )


def _counts(
    call: Call,
    length: int,
    documents: Array | None,
    start: Array | None,
    whole: Array | None,
    earlier: Earlier | None,
) -> Counts:
    none = jnp.zeros(call.batch, jnp.int32)
    document = none if earlier is None else earlier.cache.document
    return Counts(
        none if start is None else start.astype(jnp.int32),
        jnp.full(call.batch, length // call.block, jnp.int32) if whole is None else whole.astype(jnp.int32),
        none if earlier is None else earlier.fill.astype(jnp.int32),
        document_counts(document, documents, call.blocks, call.block),
    )


def _operands(
    call: Call,
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array,
    learned: Learned,
    earlier: Earlier | None,
    score: str | Array,
    documents: Array | None,
    counts: Counts,
) -> Operands:
    """As the kernels want them: whole blocks, whole lanes."""
    length, (key_dim, value_dim) = v.shape[1], (k.shape[3], v.shape[3])
    tail, wider = call.length - length, (call.key_dim - key_dim, call.value_dim - value_dim)

    def padded(x: Array, *after: int) -> Array:
        """With zeros behind the last axes."""
        return jnp.pad(x, [(0, 0)] * (x.ndim - len(after)) + [(0, n) for n in after]) if any(after) else x

    def per_head(x: Array, heads: int) -> Array:
        return padded(jnp.broadcast_to(x.astype(jnp.float32), (heads, key_dim)), wider[0])[:, None]

    own = visible = None
    beta, log_decay = chunks.finite_gates(beta, log_decay)
    if call.residual:
        beta = jnp.maximum(beta, LEAST)
    if documents is not None:
        documents = documents.astype(jnp.int32)
        mine = jnp.where(jnp.arange(length) < counts.fill[:, None], 0, documents)
        beta, log_decay = (jnp.where(mine[..., None] > 0, x, 0.0) for x in (beta, log_decay))
        own = chunks.document_rows(mine, counts.documents[:, 0], tail, call.chunk)
        visible = padded(documents, tail)[:, None]
    if earlier is None:
        cache, running = empty_cache(call.batch, call.heads, call.window, *call[7:9], call.dtype), None
        initial = jnp.zeros((*call.per_head, *call[7:9]), jnp.float32)
    else:
        cache, initial = earlier.cache, padded(earlier.state.astype(jnp.float32), *wider)
        running_scores = earlier.running_scores.astype(jnp.float32)[:, :, None]
        keys, values = padded(earlier.running_keys, wider[0]), padded(earlier.running_values, wider[1])
        running = Running(keys, values, running_scores)
    rows = Rows(
        padded(cache.keys, call.key_dim - cache.keys.shape[3]),
        padded(cache.values, call.value_dim - cache.values.shape[3]),
        cache.scores[:, :, None],
        cache.positions[:, :, None],
    )
    return Operands(
        q=chunks.to_lanes(q, tail),
        k=chunks.to_lanes(k, tail),
        v=chunks.to_lanes(v, tail),
        gates=chunks.gate_rows(beta, log_decay, tail, call.chunk),
        query_scale=per_head(learned.query_scale, call.heads),
        key_scale=per_head(learned.key_scale, call.key_heads),
        sink=learned.sink_logit.astype(jnp.float32),
        gate=learned.gate.astype(jnp.float32),
        initial=initial,
        cache=rows,
        running=running,
        scores=None if isinstance(score, str) else padded(score.astype(jnp.float32), tail)[:, :, None],
        own=own,
        visible=visible,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hola(call: Call, counts: Counts, given: Operands) -> tuple[Array, Array, Array, Rows]:
    return forward.run(call, counts, given, save=False)[:4]


def _forward(call: Call, counts: Counts, given: Operands) -> tuple[Any, Any]:
    """Kept for the backward pass: the operands, and of each block the state and the cache that it found, which of its
    tokens entered, which of its outputs are NaN, and the softmax's sums."""
    refuse_gradient(call.energy)
    results = forward.run(call, counts, given, save=True)
    return results[:4], (counts, given, results.kept)


def _backward(call: Call, saved: tuple[Counts, Operands, Any], cotangents: tuple[Array, Array, Array, Rows]) -> Any:
    (counts, given, kept), (d_out, _, d_state, d_cache) = saved, cotangents
    d = backward.run(call, counts, given, kept, backward.Upstream(d_out, d_state, d_cache.keys, d_cache.values))

    def of_key_heads(x: Array, axis: int, dtype: Any) -> Array:
        """Summed over the value heads that share a key head; lanes count as heads times widths."""
        apart = x.reshape(*x.shape[:axis], call.key_heads, call.group, -1, *x.shape[axis + 1 :])
        return jnp.sum(apart, axis=axis + 1).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :]).astype(dtype)

    running = None
    if given.running is not None:
        running = Running(of_key_heads(d.running_keys, 1, call.dtype), d.running_values, None)
    shared = call.group > 1
    return None, Operands(
        q=of_key_heads(d.q, 2, call.dtype) if shared else d.q,
        k=of_key_heads(d.k, 2, call.dtype) if shared else d.k,
        v=d.v,
        gates=d.gates,
        query_scale=jnp.sum(d.query_scale, axis=0),
        key_scale=of_key_heads(jnp.sum(d.key_scale, axis=0), 0, jnp.float32),
        sink=jnp.sum(d.sink, axis=(0, 2, 3)),
        gate=jnp.sum(d.gate, axis=(0, 2, 3)),
        initial=jnp.where(jnp.isfinite(given.initial), d.initial, 0.0),
        cache=Rows(d.cache_keys, d.cache_values, None, None),
        running=running,
        scores=None,
        own=None,
        visible=None,
    )


_hola.defvjp(_forward, _backward)


def _refuse(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array,
    learned: Learned,
    earlier: Earlier | None,
    score: str | Array,
    read: str,
    documents: Array | None,
) -> None:
    """Says what cannot run, or does not fit, before anything is compiled."""
    if log_decay.ndim == 4:
        raise NotImplementedError("the Pallas memory takes one decay per token and head, not one per key channel")
    (batch, length, heads, value_dim), (key_heads, key_dim) = v.shape, k.shape[2:]
    if q.shape != k.shape or k.shape[:2] != (batch, length) or heads % key_heads:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit: want [B, T, h, K] twice and [B, T, H, V], h dividing H"
        )
    if length == 0:
        raise ValueError("the Pallas memory needs at least one token")
    if reason := unlike((q.dtype, k.dtype, v.dtype)):
        raise NotImplementedError(reason)
    if isinstance(score, str) and score not in ("surprise", "residual"):
        raise NotImplementedError(
            f'score={score!r} is not made on the chip: "surprise" and "residual" are; give others as an array [B, H, T]'
        )
    if read not in ("rmsnorm", "unit_l2"):
        raise NotImplementedError(f'read={read!r}: the Pallas memory reads by "rmsnorm" or "unit_l2"')
    if earlier is not None and documents is None:
        raise ValueError("places that an earlier piece occupies need `documents`, which say what of them is in sight")
    shapes: list[tuple[str, Any, tuple[int, ...]]] = [
        ("beta", beta, (batch, length, heads)),
        ("log_decay", log_decay, (batch, length, heads)),
        ("sink_logit", learned.sink_logit, (heads,)),
        ("gate", learned.gate, (heads,)),
    ]
    if documents is not None:
        shapes.append(("documents", documents, (batch, length)))
    if not isinstance(score, str):
        shapes.append(("score", score, (batch, heads, length)))
    if earlier is not None:
        shapes.append(("earlier.state", earlier.state, (batch, heads, key_dim, value_dim)))
        for name, x in (("cache", earlier.cache.values), ("running_values", earlier.running_values)):
            if x.dtype != v.dtype:
                raise TypeError(f"earlier.{name} is {x.dtype}, the tokens are {v.dtype}")
    for name, x, shape in shapes:
        if x.shape != shape:
            raise ValueError(f"{name} is {x.shape}, want {shape}")
