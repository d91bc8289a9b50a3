"""The forward kernel: a few chunks of one head per grid step, S carried along the chunks in scratch memory."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta_rule import layout
from pallas_kernels.delta_rule.chunk import CHUNK, answer, norms, outgoing
from pallas_kernels.delta_rule.layout import Call, Operands, Part


class Results(NamedTuple):
    """What the forward kernel writes."""

    out: Part  # [B, T, H * V]
    norms: Part  # [B, H, n, 1, c]: the norm of each committed residual beta e
    final: Part  # [B, H, K, V]
    before: Part  # [B, H, n / RUN, K, V]: the state before each grid step, or None


def _kernel(given: Operands, results: Results, state: Any, *, call: Call) -> None:
    at = pl.program_id(2)

    @pl.when(at == 0)
    def _() -> None:
        state[...] = given.initial[...]

    before = state[...]
    if results.before is not None:
        results.before[...] = before
    for index, chunk in enumerate(layout.load_run(given, call)):
        out, write = answer(chunk, before)
        results.out[layout.rows_of(index), :] = out.astype(call.out_dtype)
        results.norms[index] = norms(write)
        before = outgoing(chunk, before, write)
    state[...] = before

    @pl.when(at == call.steps - 1)
    def _() -> None:
        results.final[...] = before


def cost(call: Call, matmuls: int, operands: Any) -> pl.CostEstimate:
    """What the compiler is told: `matmuls` products of [c, K] by [K, V] per chunk, and each operand moved once."""
    steps = call.batch * call.heads * call.chunks
    flops = 2 * CHUNK * steps * (matmuls * call.key_dim * call.value_dim + 14 * CHUNK * CHUNK)
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(operands))
    return pl.CostEstimate(flops=flops, transcendentals=steps * CHUNK * CHUNK, bytes_accessed=moved)


def run(call: Call, operands: Operands, save: bool) -> Results:
    """All chunks of all heads; `save` keeps the state before each grid step, float32, for the backward pass."""
    rows = (call.batch, call.heads, call.chunks, 1, CHUNK)
    before = (call.batch, call.heads, call.steps, call.key_dim, call.value_dim)
    shapes = Results(
        out=jax.ShapeDtypeStruct((call.batch, call.length, call.heads * call.value_dim), call.out_dtype),
        norms=jax.ShapeDtypeStruct(rows, jnp.float32),
        final=jax.ShapeDtypeStruct(call.state_shape, jnp.float32),
        before=jax.ShapeDtypeStruct(before, jnp.float32) if save else None,
    )
    blocks = Results(
        out=layout.tokens_spec(call, call.value_dim, reverse=False),
        norms=layout.rows_spec(call, 1, reverse=False),
        final=layout.state_spec(call),
        before=layout.states_spec(call, reverse=False) if save else None,
    )
    return pl.pallas_call(
        functools.partial(_kernel, call=call),
        grid=call.grid,
        in_specs=(layout.specs(call, operands.documents is not None, reverse=False),),
        out_specs=(blocks,),
        out_shape=(shapes,),
        scratch_shapes=[pltpu.VMEM((call.key_dim, call.value_dim), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(call, 3, (operands, shapes)),
        interpret=call.interpret,
        name="delta_rule_forward",
    )(operands)[0]
