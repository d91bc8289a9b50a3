"""The backward kernel: chunks from last to first, the state's gradient carried in scratch memory.

Each step makes its chunks' matrices again from the inputs and the saved state before its first chunk: inverses, writes and
the states between its chunks are cheaper to make than to move.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta_rule import layout
from pallas_kernels.delta_rule.chunk import (
    RUN,
    SPOILT,
    Chunk,
    mark_behind,
    norm_factor,
    outgoing,
    places,
    product,
    to_column,
    to_row,
)
from pallas_kernels.delta_rule.forward import cost
from pallas_kernels.delta_rule.layout import Call, Operands, Part


class Upstream(NamedTuple):
    before: Part  # [B, H, n / RUN, K, V]: the state before each grid step
    marks: Part  # [B, H, n, 1, c]: which outputs are NaN, whatever they were made of
    out: Part  # [B, T, H * V]: the gradient of the outputs
    final: Part  # [B, H, K, V]: ... and of the final state


class Gradients(NamedTuple):
    q: Part  # [B, T, H * K]: for each value head its own
    k: Part  # [B, T, H * K]
    v: Part  # [B, T, H * V]
    gates: Part  # [B, H, n, 2, c]
    initial: Part  # [B, H, K, V]


class ChunkGradient(NamedTuple):
    """By what a chunk was made of."""

    q: jax.Array  # [c, K], as the state sees them
    k: jax.Array  # [c, K]
    v: jax.Array  # [c, V]
    beta: jax.Array  # [1, c]
    log_decay: jax.Array  # [1, c]
    before: jax.Array  # [K, V]


class Inner(NamedTuple):
    """Gradients of one chunk's factors."""

    reader: jax.Array
    predictor: jax.Array
    leaver: jax.Array
    attend: jax.Array
    lower: jax.Array
    values: jax.Array  # of beta v
    keep: jax.Array
    before: jax.Array  # of the incoming state


def made_again(chunks: list[Chunk], before: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """The state before each chunk and its committed residuals."""
    found = []
    for chunk in chunks:
        write = product(chunk.inverse, chunk.v * chunk.beta - product(chunk.predictor, before))
        found.append((before, write))
        if len(found) < len(chunks):
            before = outgoing(chunk, before, write)
    return found


def through_chunk(
    chunk: Chunk, before: jax.Array, write: jax.Array, d_out: jax.Array, d_after: jax.Array, scale: float
) -> ChunkGradient:
    """Back through one chunk: from its outputs and the state that it left."""
    inner = _through_state(chunk, before, write, d_out, d_after)
    d_beta, d_decay = _gates(chunk, inner, scale)
    return ChunkGradient(*_keys(chunk, inner, scale), inner.values * chunk.beta, d_beta, d_decay, inner.before)


def _through_state(chunk: Chunk, before: jax.Array, write: jax.Array, d_out: jax.Array, d_after: jax.Array) -> Inner:
    """Back through the reads, the write and the outgoing state."""
    size = chunk.beta.shape[0]
    d_write = product(chunk.attend, d_out, (0, 0)) + product(chunk.leaver, d_after)
    d_rest = product(chunk.inverse, d_write, (0, 0))
    d_seen = jnp.concatenate([d_out, -d_rest])
    readers = jnp.concatenate([chunk.reader, chunk.predictor])
    d_readers, d_pairs = product(d_seen, before, (1, 1)), product(d_seen, write, (1, 1))
    return Inner(
        reader=d_readers[:size],
        predictor=d_readers[size:],
        leaver=product(write, d_after, (1, 1)),
        attend=d_pairs[:size],
        lower=d_pairs[size:],
        values=d_rest,
        keep=jnp.sum(jnp.sum(before * d_after, axis=1, keepdims=True), axis=0, keepdims=True),
        before=chunk.decay.keep * d_after + product(readers, d_seen, (0, 0)),
    )


def _rows_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)


def _gates(chunk: Chunk, inner: Inner, scale: float) -> tuple[jax.Array, jax.Array]:
    """The gradients of beta and of the log decays, as rows."""
    decay = chunk.decay
    pairs = product(chunk.k, chunk.k, (1, 1)) * decay.strict  # `lower` without beta, which may be 0
    predicted = _rows_sum(inner.predictor * chunk.k)
    d_beta = _rows_sum(inner.lower * pairs) + _rows_sum(inner.values * chunk.v) + decay.entering * predicted
    between = inner.attend * chunk.attend + inner.lower * chunk.lower
    entered = decay.entering * (scale * _rows_sum(inner.reader * chunk.q) + chunk.beta * predicted)
    left = decay.leaving * _rows_sum(inner.leaver * chunk.k)
    d_total = _rows_sum(between) + entered - left
    last = jnp.sum(left, axis=0, keepdims=True) + inner.keep * decay.keep
    size = left.shape[0]
    i, _ = places(size)
    d_total = d_total + jnp.where(i[:, :1] == size - 1, last, 0.0)
    # As a column plus a row: the running sum's gradient by token i, less what token j's sum took away.
    taken = to_row(d_total) - jnp.sum(between, axis=0, keepdims=True)
    return to_row(d_beta), _suffix(chunk, taken)


def _suffix(chunk: Chunk, row: jax.Array) -> jax.Array:
    """The sum of a row from each token on, to the end of its document: what a running sum's gradient is."""
    i, j = places(row.shape[1])
    column = jnp.sum(jnp.where(i == j, row, 0.0), axis=1, keepdims=True)
    return jnp.sum(jnp.where(chunk.decay.run, column, 0.0), axis=0, keepdims=True)


def _keys(chunk: Chunk, inner: Inner, scale: float) -> tuple[jax.Array, jax.Array]:
    """The gradients of queries and keys as the state sees them."""
    decay = chunk.decay
    d_attend = inner.attend * (decay.pairs * scale)
    d_lower = inner.lower * (decay.strict * chunk.beta)
    d_q = inner.reader * (scale * decay.entering) + product(d_attend, chunk.k)
    d_k = inner.predictor * (chunk.beta * decay.entering) + inner.leaver * decay.leaving
    d_k = d_k + product(d_lower, chunk.k) + product(d_lower, chunk.k, (0, 0)) + product(d_attend, chunk.q, (0, 0))
    return d_q, d_k


def through_norm(raw: jax.Array, unit: jax.Array, gradient: jax.Array) -> jax.Array:
    """By the float32 rows of which `unit` was made."""
    along = _rows_sum(unit * gradient)
    return norm_factor(raw) * (gradient - unit * along)


def unspoilt(gradient: jax.Array, marks: jax.Array) -> jax.Array:
    """The gradient of outputs, without those that are NaN. `marks` is a row."""
    return jnp.where(to_column(marks) > 0.0, 0.0, gradient.astype(jnp.float32))


def _kernel(given: Operands, upstream: Upstream, results: Gradients, carried: Any, *, call: Call) -> None:
    at = pl.program_id(2)

    @pl.when(at == 0)
    def _() -> None:
        mark = mark_behind(to_column(upstream.marks[RUN - 1]))
        carried[...] = jnp.where(mark == SPOILT, 0.0, upstream.final[...])

    chunks, d_state = layout.load_run(given, call), carried[...]
    between = made_again(chunks, upstream.before[...])
    for index in reversed(range(RUN)):
        rows, chunk = layout.rows_of(index), chunks[index]
        d_out = unspoilt(upstream.out[rows, :], upstream.marks[index])
        d = through_chunk(chunk, *between[index], d_out, d_state, call.scale)
        d_q, d_k, d_state = d.q, d.k, d.before
        if call.normalise:
            d_q = through_norm(given.q[rows, :].astype(jnp.float32), chunk.q, d_q)
            d_k = through_norm(given.k[rows, :].astype(jnp.float32), chunk.k, d_k)
        for result, gradient, finite in zip(results, (d_q, d_k, d.v), chunk.finite, strict=False):
            result[rows, :] = jnp.where(finite, gradient, 0.0).astype(result.dtype)
        results.gates[index, 0:1, :] = d.beta
        results.gates[index, 1:2, :] = jnp.where(chunk.finite.gates, d.log_decay, 0.0)
    carried[...] = d_state

    @pl.when(at == call.steps - 1)
    def _() -> None:
        results.initial[...] = d_state


def run(call: Call, operands: Operands, upstream: Upstream) -> Operands:
    """The gradient of every operand, documents aside."""
    shared = call.heads != call.key_heads
    wide = (call.batch, call.length, call.heads * call.key_dim)
    keys = jax.ShapeDtypeStruct(wide, jnp.float32 if shared else operands.q.dtype)
    shapes = Gradients(
        q=keys,
        k=jax.ShapeDtypeStruct(wide, jnp.float32 if shared else operands.k.dtype),
        v=jax.ShapeDtypeStruct(operands.v.shape, operands.v.dtype),
        gates=jax.ShapeDtypeStruct(operands.gates.shape, jnp.float32),
        initial=jax.ShapeDtypeStruct(call.state_shape, jnp.float32),
    )
    key_blocks, value_blocks = (layout.tokens_spec(call, x, reverse=True) for x in (call.key_dim, call.value_dim))
    state = layout.state_spec(call)
    gradients = pl.pallas_call(
        functools.partial(_kernel, call=call),
        grid=call.grid,
        in_specs=(
            layout.specs(call, operands.documents is not None, reverse=True),
            Upstream(
                layout.states_spec(call, reverse=True), layout.rows_spec(call, 1, reverse=True), value_blocks, state
            ),
        ),
        out_specs=(Gradients(key_blocks, key_blocks, value_blocks, layout.rows_spec(call, 2, reverse=True), state),),
        out_shape=(shapes,),
        scratch_shapes=[pltpu.VMEM((call.key_dim, call.value_dim), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(call, 8, (operands, upstream, shapes)),
        interpret=call.interpret,
        name="delta_rule_backward",
    )(operands, upstream)[0]
    d_q, d_k = (_sum_group(call, x, y.dtype) for x, y in ((gradients.q, operands.q), (gradients.k, operands.k)))
    d_initial = jnp.where(jnp.isfinite(operands.initial), gradients.initial, 0.0)
    return Operands(d_q, d_k, gradients.v, gradients.gates, d_initial, None)


def _sum_group(call: Call, x: jax.Array, dtype: Any) -> jax.Array:
    """[B, T, H * K] summed over the value heads of each key head."""
    if call.heads == call.key_heads:
        return x
    x = x.reshape(call.batch, call.length, call.key_heads, -1, call.key_dim).sum(axis=3)
    return x.reshape(call.batch, call.length, -1).astype(dtype)
