"""The backward kernel: blocks from last to first, with the gradients of the state and of the cache on the chip.

Each step makes its block's matrices and read keys again from the inputs and from what the block found, goes back through
the merge, the read and the chunks, and writes each gradient once: what a token owes the cache and what it owes the state
are added before they are rounded.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cache.backward import Sums, through_merge, through_read
from pallas_kernels.delta_rule.backward import ChunkGradient, made_again, through_chunk, through_norm, unspoilt
from pallas_kernels.delta_rule.chunk import SPOILT, Chunk, mark_behind, outgoing, to_column
from pallas_kernels.hola.forward import Kept, kept_specs, prepared_scratch
from pallas_kernels.hola.layout import (
    Call,
    Counts,
    Operands,
    Part,
    Places,
    Prepared,
    cost,
    for_runs,
    load_chunk,
    occupied,
    prepare,
    read_factor,
)


class Upstream(NamedTuple):
    """Gradients by what the forward kernel gives."""

    out: Part  # [B, T, H * V]
    state: Part  # [B, H, K, V]
    cache_keys: Part  # [B, H, W, K]
    cache_values: Part  # [B, H, W, V]


class Gradients(NamedTuple):
    """By the operands; for each value head its own, where heads share a key head."""

    q: Part  # [B, T, H * K]
    k: Part  # [B, T, H * K]
    v: Part  # [B, T, H * V]
    gates: Part  # [B, H, T / c, 2, c]
    query_scale: Part  # [B, H, 1, K]
    key_scale: Part  # [B, H, 1, K]
    sink: Part  # [B, H, 1, C], to be summed over
    gate: Part  # [B, H, 1, C], to be summed over
    initial: Part  # [B, H, K, V]
    cache_keys: Part  # [B, H, W, K]
    cache_values: Part  # [B, H, W, V]
    running_keys: Part  # [B, H, C, K], or None
    running_values: Part  # [B, H, C, V], or None


class OnChip(NamedTuple):
    """What is added up along the blocks of a head, or waits inside one; float32."""

    state: Any  # [K, V]: by the state after the block, then before it
    sums: Sums
    queries: Any  # [C, K]: by the read's queries
    query_scale: Any  # [1, K]
    key_scale: Any  # [1, K]
    prepared: Prepared
    between: Any  # [m, K, V]: the state before each chunk
    writes: Any  # [C, V]
    inverses: Any  # [m, c, c]


def _through_read_norm(raw: Array, scale: Array, d_ready: Array, share: float) -> tuple[Array, Array]:
    """The gradients by what was normalised for the read, and by its scale."""
    factor = read_factor(raw, share)
    unit, d_unit = raw * factor, d_ready * scale
    along = share * jnp.sum(unit * d_unit, axis=1, keepdims=True)
    return factor * (d_unit - unit * along), jnp.sum(d_ready * unit, axis=0, keepdims=True)


def _through_state(given: Operands, before: Any, results: Gradients, on_chip: OnChip, call: Call) -> None:
    """Back through the chunks, and out: the read's gradients are there already. First forward again, for the states
    between the chunks; of a chunk's matrices the inverse waits, the rest is made twice. Two results hold other numbers
    until their own come: `v` the gradient by the outputs, `initial` the state on its way forward."""
    results.initial[...] = before[...]

    def again(indices: list[Any]) -> None:
        chunks = [load_chunk(given, call, index) for index in indices]
        between = made_again(chunks, results.initial[...])
        for index, chunk, (found, write) in zip(indices, chunks, between, strict=True):
            on_chip.between[index], on_chip.writes[call.rows_of(index), :] = found, write
            on_chip.inverses[index] = chunk.inverse
        results.initial[...] = outgoing(chunks[-1], *between[-1])

    def back(indices: list[Any]) -> None:
        indices = [call.chunks - 1 - index for index in indices]
        chunks = [load_chunk(given, call, index, on_chip.inverses[index]) for index in indices]
        d_state = on_chip.state[...]
        for index, chunk in zip(indices, chunks, strict=True):
            rows = call.rows_of(index)
            write, d_out = on_chip.writes[rows, :], results.v[rows, :].astype(jnp.float32)
            d = through_chunk(chunk, on_chip.between[index], write, d_out, d_state, call.scale)
            d_state = d.before
            _out(given, chunk, index, d, results, on_chip, call)
        on_chip.state[...] = d_state

    for_runs(call, again)
    for_runs(call, back)


def _out(
    given: Operands, chunk: Chunk, index: Any, d: ChunkGradient, results: Gradients, on_chip: OnChip, call: Call
) -> None:
    """What a chunk's tokens owe the state and what they owe the read, added."""
    rows = call.rows_of(index)
    known = chunk.finite
    for raw, fine, unit, by_unit, d_ready, scale, d_scale, result in (
        (given.q, known.q, chunk.q, d.q, on_chip.queries, given.query_scale, on_chip.query_scale, results.q),
        (given.k, known.k, chunk.k, d.k, on_chip.sums.keys, given.key_scale, on_chip.key_scale, results.k),
    ):
        x = jnp.where(fine, raw[rows, :].astype(jnp.float32), 0.0)
        by_read, by_scale = _through_read_norm(x, scale[...], d_ready[rows, :], call.share)
        d_scale[...] += by_scale
        result[rows, :] = jnp.where(fine, through_norm(x, unit, by_unit) + by_read, 0.0).astype(result.dtype)
    results.v[rows, :] = jnp.where(known.v, d.v + on_chip.sums.values[rows, :], 0.0).astype(results.v.dtype)
    results.gates[index, 0:1, :] = d.beta
    results.gates[index, 1:2, :] = jnp.where(known.gates, d.log_decay, 0.0)


def _kernel(*refs: Any, call: Call) -> None:
    counts, (given, kept, upstream, results, on_chip) = Counts(*refs[:4]), refs[4:]
    b, h, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    block, sums = call.blocks - 1 - step, on_chip.sums

    @pl.when(step == 0)
    def _() -> None:
        mark = mark_behind(to_column(kept.marks[call.chunks - 1]))
        on_chip.state[...] = jnp.where(mark == SPOILT, 0.0, upstream.state[...])
        sums.cache_keys[...] = upstream.cache_keys[...].astype(jnp.float32)
        sums.cache_values[...] = upstream.cache_values[...].astype(jnp.float32)
        for x in (sums.sink, sums.gate, on_chip.query_scale, on_chip.key_scale):
            x[...] = jnp.zeros_like(x)

    tokens = prepare(given, on_chip.prepared, call, block == 0, counts.fill[b])
    for index, rows in enumerate(call.chunk_slices):
        results.v[rows, :] = unspoilt(upstream.out[rows, :], kept.marks[index]).astype(call.dtype)
    through_merge(kept.cache.source[...], sums, call.dtype)
    document = counts.documents[b, block]
    through_read(tokens, kept.cache, given.sink[h], document, results.v, on_chip.queries, sums, given.gate[h])
    if given.running is not None:

        @pl.when(block == 0)
        def _() -> None:
            held = occupied(call, counts.fill[b])
            for result, total in ((results.running_keys, sums.keys), (results.running_values, sums.values)):
                result[...] = jnp.where(held, total[...], 0.0).astype(result.dtype)
                total[...] = jnp.where(held, 0.0, total[...])

    _through_state(given, kept.state, results, on_chip, call)

    @pl.when(step == call.blocks - 1)
    def _() -> None:
        for result, total in (
            (results.query_scale, on_chip.query_scale),
            (results.key_scale, on_chip.key_scale),
            (results.sink, sums.sink),
            (results.gate, sums.gate),
            (results.initial, on_chip.state),
            (results.cache_keys, sums.cache_keys),
            (results.cache_values, sums.cache_values),
        ):
            result[...] = total[...].astype(result.dtype)


def _shapes(call: Call, running: bool) -> Gradients:
    # Value heads that share a key head are summed over outside, and should not be rounded before.
    keys = (call.batch, call.length, call.heads * call.key_dim)
    by_key = jnp.float32 if call.group > 1 else call.dtype

    def of_head(*size: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((*call.per_head, *size), dtype)

    return Gradients(
        q=jax.ShapeDtypeStruct(keys, by_key),
        k=jax.ShapeDtypeStruct(keys, by_key),
        v=jax.ShapeDtypeStruct((call.batch, call.length, call.heads * call.value_dim), call.dtype),
        gates=of_head(call.blocks * call.chunks, 2, call.chunk),
        query_scale=of_head(1, call.key_dim),
        key_scale=of_head(1, call.key_dim),
        sink=of_head(1, call.block),
        gate=of_head(1, call.block),
        initial=of_head(call.key_dim, call.value_dim),
        cache_keys=of_head(call.window, call.key_dim, dtype=call.dtype),
        cache_values=of_head(call.window, call.value_dim, dtype=call.dtype),
        running_keys=of_head(call.block, call.key_dim, dtype=by_key) if running else None,
        running_values=of_head(call.block, call.value_dim, dtype=call.dtype) if running else None,
    )


def _specs(places: Places, running: bool) -> Gradients:
    call = places.call
    keys, values = places.tokens(call.key_dim), places.tokens(call.value_dim)
    return Gradients(
        q=keys,
        k=keys,
        v=values,
        gates=places.chunk_rows(2),
        query_scale=places.of_head(1, call.key_dim),
        key_scale=places.of_head(1, call.key_dim),
        sink=places.of_head(1, call.block),
        gate=places.of_head(1, call.block),
        initial=places.of_head(call.key_dim, call.value_dim),
        cache_keys=places.of_head(call.window, call.key_dim),
        cache_values=places.of_head(call.window, call.value_dim),
        running_keys=places.of_head(call.block, call.key_dim) if running else None,
        running_values=places.of_head(call.block, call.value_dim) if running else None,
    )


def _scratch(call: Call) -> OnChip:
    def floats(*size: int) -> Any:
        return pltpu.VMEM(size, jnp.float32)

    keys, values = (call.block, call.key_dim), (call.block, call.value_dim)
    cache = floats(call.window, call.key_dim), floats(call.window, call.value_dim)
    sums = Sums(*cache, floats(*keys), floats(*values), floats(1, call.block), floats(1, call.block))
    scales = floats(1, call.key_dim), floats(1, call.key_dim)
    prepared = prepared_scratch(call)._replace(scores=None)
    state = call.key_dim, call.value_dim
    again = floats(call.chunks, *state), floats(*values), floats(call.chunks, call.chunk, call.chunk)
    return OnChip(floats(*state), sums, floats(*keys), *scales, prepared, *again)


def run(call: Call, counts: Counts, given: Operands, kept: Kept, upstream: Upstream) -> Gradients:
    """The gradient of every operand that has one."""
    places, running = Places(call, lambda step: call.blocks - 1 - step), given.running is not None
    given = given._replace(scores=None, initial=None, cache=None)
    shapes, state = _shapes(call, running), places.of_head(call.key_dim, call.value_dim)
    cache = places.of_head(call.window, call.key_dim), places.of_head(call.window, call.value_dim)
    return pl.pallas_call(
        functools.partial(_kernel, call=call),
        out_shape=(shapes,),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(call.batch, call.heads, call.blocks),
            in_specs=[
                places.operands(given),
                kept_specs(places),
                Upstream(places.tokens(call.value_dim), state, *cache),
            ],
            out_specs=(_specs(places, running),),
            scratch_shapes=[_scratch(call)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(call, 8, 5, 4 if call.dtype == jnp.bfloat16 else 2, (given, kept, upstream, shapes)),
        interpret=call.interpret,
        name="hola_backward",
    )(*counts, given, kept, upstream)[0]
