"""HOLA's exact cache on a Hopper GPU: the choice of rows in XLA, then the read of all blocks at once in a kernel."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.cache.arrays import Cache
from pallas_kernels.cache.call import empty_cache
from pallas_kernels.cache.gpu.backward import Known, by_entries, by_queries
from pallas_kernels.cache.gpu.choice import (
    Found,
    along_stay,
    found_by_blocks,
    positions_of,
    rows_of,
    slots_entered,
    to_tokens,
)
from pallas_kernels.cache.gpu.forward import forward
from pallas_kernels.cache.gpu.limits import refuse
from pallas_kernels.cache.gpu.places import Operands, Sizes
from pallas_kernels.cache.gpu.tiles import LOG2E, ROWS
from pallas_kernels.cache.limits import refuse_arrays


class Static(NamedTuple):
    """What a compiled call depends on beside its arrays."""

    sizes: Sizes
    interpret: Any


class Inputs(NamedTuple):
    """What has a gradient."""

    queries: Array  # [B, T, H, K]
    keys: Array  # [B, T, h, K]
    values: Array  # [B, T, H, V]
    sink: Array  # [H]
    cache_keys: Array | None  # [B, H, W, K]; None where the call is given no cache
    cache_values: Array | None  # [B, H, W, V]


def cached_read(
    queries: Array,
    keys: Array,
    values: Array,
    scores: Array,
    sink_logit: Array,
    cache: Cache | None = None,
    *,
    documents: Array | None = None,
    start: Array | None = None,
    whole: Array | None = None,
    window: int,
    block: int,
    out_dtype: DTypeLike | None = None,
    energy: float | None = None,
    interpret: Any = False,
) -> tuple[Array, Cache, Array]:
    """As `pallas_kernels.cache.cached_read`, which tells of the arguments and the results; for bfloat16 keys and values.

    What is read is rounded to bfloat16 before it becomes `out_dtype`. `interpret` is a `plgpu.InterpretGPUParams`, or
    True for one.
    """
    refuse_arrays(queries, keys, values, scores, cache)
    refuse(keys, values, window, block, energy)
    batch, length, heads, key_dim = queries.shape
    blocks = max(1, -(-length // block))
    tail = blocks * block - length
    rows = -(-window // ROWS) * ROWS
    sizes = Sizes(batch, heads, heads // keys.shape[2], blocks, block, rows, key_dim, values.shape[3])
    # The barrier keeps the compiler from folding the first merges, which takes it longer than they do.
    empty = jax.lax.optimization_barrier(empty_cache(batch, heads, window, 1, 1, keys.dtype))
    given = empty if cache is None else cache
    start = jnp.zeros(batch, jnp.int32) if start is None else start.astype(jnp.int32)
    whole = jnp.full(batch, length // block, jnp.int32) if whole is None else whole.astype(jnp.int32)

    def padded(x: Array, axis: int = 1) -> Array:
        return jnp.pad(x, [(0, tail if a == axis else 0) for a in range(x.ndim)]) if tail else x

    documents = None if documents is None else padded(documents.astype(jnp.int32))
    found = found_by_blocks(padded(scores.astype(jnp.float32), axis=2), documents, whole, given, block)
    inputs = Inputs(
        padded(queries.astype(keys.dtype)),
        padded(keys),
        padded(values),
        sink_logit.astype(jnp.float32),
        None if cache is None else cache.keys,
        None if cache is None else cache.values,
    )
    static = Static(sizes, plgpu.InterpretGPUParams() if interpret is True else interpret or None)
    out, last_keys, last_values = _cached_read(static, inputs, jax.lax.stop_gradient(found), documents)
    positions = positions_of(found, given.positions, start)
    after = Cache(last_keys, last_values, found.scores[:, :, -1], positions[:, :, -1], found.documents[:, -1])
    return out[:, :length].astype(out_dtype or values.dtype), after, positions[:, :, 1:]


def _operands(sizes: Sizes, inputs: Inputs, found: Found, documents: Array | None) -> Operands:
    def flat(rows: Array) -> Array:
        short = sizes.window - rows.shape[3]
        rows = jnp.pad(rows[:, :, :-1], [(0, short if axis == 3 else 0) for axis in range(rows.ndim)])
        return rows.reshape(sizes.rows, *rows.shape[4:])

    if documents is None:
        asking = owners = jnp.ones((sizes.batch, sizes.tokens), jnp.int32)
        document = jnp.int32(1)
    else:
        asking, owners = documents, jnp.where(documents > 0, documents, -1)
        document = found.documents[:, None, :, None]
    # One more than the owner, so that what is added to fill up a tile, 0, is of no document either.
    cached_owners = jnp.where(found.scores > -jnp.inf, document, -1) + 1
    return Operands(
        inputs.queries,
        inputs.keys,
        inputs.values,
        flat(rows_of(inputs.keys, inputs.cache_keys, found)),
        flat(rows_of(inputs.values, inputs.cache_values, found)),
        asking.reshape(-1),
        owners.reshape(-1),
        flat(cached_owners) - 1,
    )


def _last(found: Found) -> Found:
    return Found(found.documents[:, -1:], found.scores[:, :, -1:], found.places[:, :, -1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cached_read(static: Static, inputs: Inputs, found: Found, documents: Array | None) -> tuple[Array, Array, Array]:
    """What is read, and the keys and values of the cache after the last whole block."""
    return _forward(static, inputs, found, documents)[0]


def _forward(static: Static, inputs: Inputs, found: Found, documents: Array | None) -> tuple[Any, Any]:
    """Kept for the backward pass: the inputs, what was read, a number for each query and what the blocks found."""
    operands = _operands(static.sizes, inputs, found, documents)
    out, log_total = forward(static.sizes, operands, inputs.sink, static.interpret)
    last = _last(found)
    last_keys = rows_of(inputs.keys, inputs.cache_keys, last)[:, :, 0]
    last_values = rows_of(inputs.values, inputs.cache_values, last)[:, :, 0]
    return (out, last_keys, last_values), (inputs, found, documents, out, log_total)


def _backward(static: Static, kept: Any, d_results: tuple[Array, Array, Array]) -> Any:
    sizes = static.sizes
    inputs, found, documents, out, log_total = kept
    d_out, d_last_keys, d_last_values = d_results
    operands = _operands(sizes, inputs, found, documents)
    spent = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=3).swapaxes(1, 2)  # [B, H, T]
    known = Known(d_out.astype(jnp.bfloat16), log_total, spent.reshape(-1))
    d_queries = by_queries(sizes, operands, known, static.interpret)
    d = by_entries(sizes, operands, known, static.interpret)
    entered = slots_entered(found, sizes.block)

    def through_caches(of_tokens: Array, of_rows: Array, of_last: Array, group: int) -> tuple[Array, Array]:
        """The gradient by tokens [B, T, h, X] and by the rows of the given cache."""
        window = of_last.shape[2]
        rows = of_rows.reshape(*found.scores.shape[:2], sizes.blocks, sizes.window, -1)[:, :, :, :window]
        rows = jnp.concatenate([rows.astype(jnp.float32), of_last.astype(jnp.float32)[:, :, None]], axis=2)
        rows = along_stay(rows, found)
        total = of_tokens.astype(jnp.float32) + to_tokens(rows, entered)
        if group > 1:
            total = total.reshape(*total.shape[:2], -1, group, total.shape[3]).sum(axis=3)
        return total.astype(jnp.bfloat16), rows[:, :, 0].astype(of_last.dtype)

    d_keys, d_cache_keys = through_caches(d.keys, d.cached_keys, d_last_keys, sizes.group)
    d_values, d_cache_values = through_caches(d.values, d.cached_values, d_last_values, 1)
    share = jnp.exp2(inputs.sink[:, None] * LOG2E - log_total.reshape(spent.shape))
    d_sink = -jnp.sum(share * spent, axis=(0, 2))
    of_cache = (d_cache_keys, d_cache_values) if inputs.cache_keys is not None else (None, None)
    return Inputs(d_queries, d_keys, d_values, d_sink, *of_cache), None, None


_cached_read.defvjp(_forward, _backward)
