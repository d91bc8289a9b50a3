"""The forward kernel: a few chunks of one head per grid step, S carried along the chunks in scratch memory."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta_rule import layout
from pallas_kernels.delta_rule.chunk import (
    CHUNK,
    SPOILT,
    answer,
    mark_behind,
    marked,
    norms,
    outgoing,
    spoilt,
    to_row,
    without_spoilt,
)
from pallas_kernels.delta_rule.layout import Call, Operands, Part


class Results(NamedTuple):
    """What the forward kernel writes."""

    out: Part  # [B, T, H * V]
    norms: Part  # [B, H, n, 1, c]: the norm of each committed residual beta e
    final: Part  # [B, H, K, V]
    before: Part  # [B, H, n / RUN, K, V]: the state before each grid step, or None
    marks: Part  # [B, H, n, 1, c]: see `chunk.spoilt`; or None


class Carried(NamedTuple):
    """What goes from chunk to chunk on the chip."""

    state: Any  # [K, V]
    mark: Any  # [1, 1]: whether the state is spoilt


def _kernel(given: Operands, results: Results, carried: Carried, *, call: Call) -> None:
    at = pl.program_id(2)

    @pl.when(at == 0)
    def _() -> None:
        carried.state[...], carried.mark[...] = without_spoilt(given.initial[...])

    before, mark = carried.state[...], carried.mark[...]
    if results.before is not None:
        results.before[...] = before
    for index, chunk in enumerate(layout.load_run(given, call)):
        documents, (out, write) = layout.documents_of(given, index), answer(chunk, before)
        marks = spoilt(chunk, documents, mark)
        results.out[layout.rows_of(index), :] = marked(out, marks, documents).astype(call.out_dtype)
        results.norms[index] = norms(write)
        if results.marks is not None:
            results.marks[index] = to_row(marks)
        before, mark = outgoing(chunk, before, write), mark_behind(marks)
    carried.state[...], carried.mark[...] = before, mark

    @pl.when(at == call.steps - 1)
    def _() -> None:
        results.final[...] = jnp.where(mark == SPOILT, jnp.nan, before)


def cost(call: Call, matmuls: int, operands: Any) -> pl.CostEstimate:
    """What the compiler is told: `matmuls` products of [c, K] by [K, V] per chunk, and each operand moved once."""
    steps = call.batch * call.heads * call.chunks
    flops = 2 * CHUNK * steps * (matmuls * call.key_dim * call.value_dim + 14 * CHUNK * CHUNK)
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(operands))
    return pl.CostEstimate(flops=flops, transcendentals=steps * CHUNK * CHUNK, bytes_accessed=moved)


def run(call: Call, operands: Operands, save: bool) -> Results:
    """All chunks of all heads; `save` keeps for the backward pass the marks and, in float32, the state before each step."""
    rows = (call.batch, call.heads, call.chunks, 1, CHUNK)
    before = (call.batch, call.heads, call.steps, call.key_dim, call.value_dim)
    shapes = Results(
        out=jax.ShapeDtypeStruct((call.batch, call.length, call.heads * call.value_dim), call.out_dtype),
        norms=jax.ShapeDtypeStruct(rows, jnp.float32),
        final=jax.ShapeDtypeStruct(call.state_shape, jnp.float32),
        before=jax.ShapeDtypeStruct(before, jnp.float32) if save else None,
        marks=jax.ShapeDtypeStruct(rows, jnp.float32) if save else None,
    )
    blocks = Results(
        out=layout.tokens_spec(call, call.value_dim, reverse=False),
        norms=layout.rows_spec(call, 1, reverse=False),
        final=layout.state_spec(call),
        before=layout.states_spec(call, reverse=False) if save else None,
        marks=layout.rows_spec(call, 1, reverse=False) if save else None,
    )
    return pl.pallas_call(
        functools.partial(_kernel, call=call),
        grid=call.grid,
        in_specs=(layout.specs(call, operands.documents is not None, reverse=False),),
        out_specs=(blocks,),
        out_shape=(shapes,),
        scratch_shapes=[Carried(*(pltpu.VMEM(size, jnp.float32) for size in (call.state_shape[2:], (1, 1))))],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(call, 3, (operands, shapes)),
        interpret=call.interpret,
        name="delta_rule_forward",
    )(operands)[0]
