"""The kernel of one token: a thread block takes a few columns of S, or a few rows of what may be read.

All of it is one pass over memory, so the parts of a head are many and small, at most 32 KB: a single row of 4 heads is at
work on dozens of multiprocessors, and of many rows four parts share one, whose loads are all under way at once. Loads go
to registers, whole lines of 128 bytes; each number is used once, so shared memory would gain nothing.

Columns of S are independent of each other, but for |e|, whose squares are summed over parts outside. Rows are read as in
flash decoding: each part has a maximum, a sum and a mean of its own, and they are put together outside, in arrays
that are a hundredth of what was read. The read does not wait for the score: it matters where a block is complete.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LEAST = -1e30  # the maximum of a part that sees nothing
ELEMENTS = 8192  # of S to a part: 64 registers of each thread
ROWS = 32  # of cache or block to a part
SUMS = 4096  # bytes: of 256 columns, from each of 4 warps


class Call(NamedTuple):
    """The sizes of one call, all static."""

    batch: int
    heads: int
    key_heads: int
    block: int
    window: int
    key_dim: int
    value_dim: int
    scale: float
    dtype: Any
    interpret: Any  # None or plgpu.InterpretGPUParams

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def columns(self) -> int:
        """Of S, to a part."""
        return min(self.value_dim, ELEMENTS // self.key_dim)

    @property
    def states(self) -> int:
        return self.value_dim // self.columns

    @property
    def cached(self) -> int:
        return self.window // ROWS

    @property
    def running(self) -> int:
        return self.block // ROWS


class Counts(NamedTuple):
    """Of each row of the batch, int32."""

    real: Any  # whether the token is none of padding; a row of padding is left alone
    new: Any  # whether it begins a document
    fill: Any  # its place in the running block


class Token(NamedTuple):
    key: Any  # [B, h, K] float32, of unit length: what S is written with
    query: Any  # [B, h, K]
    value: Any  # [B, H, V], as it is stored
    beta: Any  # [B, H] float32
    decay: Any  # [B, H]: what is left of S
    asks: Any  # [B, H, K] float32: what is read with
    stored: Any  # [B, h, K]: the key as it is stored
    see_cache: Any  # [B, H, W] float32: 0 where a row may be read, -inf where not
    see_block: Any  # [B, C]: of the tokens before this one


class Store(NamedTuple):
    """The memory's large arrays, which are changed in place."""

    state: Any  # [B, H, K, V] float32
    cache_keys: Any  # [B, H, W, K]
    cache_values: Any  # [B, H, W, V]
    block_keys: Any  # [B, h, C, K]
    block_values: Any  # [B, H, C, V]


class Results(NamedTuple):
    """Undefined at rows of padding. A part that sees nothing has total 0 and, of `means`, nothing."""

    answer: Any  # [B, H, V] float32: of S
    squares: Any  # [B, H, parts]: of e, summed over a part's columns; NaN where S is not finite there
    means: Any  # [B, H, parts, V] float32: what a part's rows hold, weighted by exp(logit - top)
    tops: Any  # [B, H, parts]
    totals: Any  # [B, H, parts]


def layout(threads: int) -> Any:
    """Four neighbours to a thread, `threads` to a line, as many lines as there are more threads."""
    lines, line = 32 // threads, 4 * threads
    tiling: Any = plgpu.Tiling(((4 * lines, line), (lines, line), (4,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


OF_STATE, OF_ROWS = layout(8), layout(16)  # lines of 128 bytes: float32 and bfloat16


def _load(ref: Any, held: Any) -> Array:
    return plgpu.load(ref, layout=held, optimized=False)


def _store(ref: Any, value: Array) -> None:
    plgpu.store(ref, value, optimized=False)


def _spread(x: Array, shape: tuple[int, int], held: Any, axis: int) -> Array:
    """A vector along an axis of a matrix, repeated along the other."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [axis]), held)


def _through_state(call: Call, counts: Counts, token: Token, memory: Store, results: Results) -> None:
    part, h, b = (lax.axis_index(name) for name in ("part", "head", "batch"))
    key_head, shape = lax.div(h, jnp.int32(call.group)), (call.key_dim, call.columns)
    columns = pl.ds(part * call.columns, call.columns)
    along_keys, along_values = OF_STATE.reduce(1), OF_STATE.reduce(0)
    place = memory.state.at[b, h, :, columns]
    state = lax.cond(
        counts.new[b] > 0,
        lambda: plgpu.layout_cast(jnp.zeros(shape, jnp.float32), OF_STATE),
        lambda: _load(place, OF_STATE),
    )
    state = state * token.decay[b, h]
    key = _spread(_load(token.key.at[b, key_head], along_keys), shape, OF_STATE, 0)
    value = _load(token.value.at[b, h, columns], along_values).astype(jnp.float32)
    error = value - jnp.sum(key * state, axis=0)
    state = state + key * _spread(error * token.beta[b, h], shape, OF_STATE, 1)
    _store(place, state)
    query = _spread(_load(token.query.at[b, key_head], along_keys), shape, OF_STATE, 0)
    _store(results.answer.at[b, h, columns], call.scale * jnp.sum(query * state, axis=0))
    # 0 * x is NaN just where x is not finite; e is, where anything of its column of S is not.
    results.squares[b, h, part] = jnp.sum(error * error + 0.0 * error)


def _read(
    call: Call, asks: Any, see: Any, keys: Array, values: Any, results: Results, place: tuple[Any, Any, Any]
) -> None:
    """What one head reads of a part's rows; `keys` are in registers, the rest is not."""
    of_keys, of_values = (ROWS, call.key_dim), (ROWS, call.value_dim)
    values = _load(values, OF_ROWS).astype(jnp.float32)
    query = _spread(_load(asks, OF_ROWS.reduce(0)), of_keys, OF_ROWS, 1)
    logits = jnp.sum(keys * query, axis=1) + _load(see, OF_ROWS.reduce(1))
    top = jnp.maximum(jnp.max(logits), LEAST)
    weights = jnp.exp(logits - top)
    b, h, part = place
    results.tops[b, h, part] = top
    results.totals[b, h, part] = jnp.sum(weights)
    _store(results.means.at[b, h, part], jnp.sum(values * _spread(weights, of_values, OF_ROWS, 0), axis=0))


def _read_cache(call: Call, counts: Counts, token: Token, memory: Store, results: Results) -> None:
    part, h, b = (lax.axis_index(name) for name in ("part", "head", "batch"))
    part = part - call.states
    rows = pl.ds(part * ROWS, ROWS)
    stores = memory.cache_keys.at[b, h, rows], memory.cache_values.at[b, h, rows]

    @pl.when(counts.new[b] > 0)
    def _() -> None:
        results.totals[b, h, part], results.tops[b, h, part] = jnp.float32(0), jnp.float32(LEAST)
        for store, width in zip(stores, (call.key_dim, call.value_dim), strict=True):
            _store(store, plgpu.layout_cast(jnp.zeros((ROWS, width), call.dtype), OF_ROWS))

    @pl.when(counts.new[b] == 0)
    def _() -> None:
        keys = _load(stores[0], OF_ROWS).astype(jnp.float32)
        _read(call, token.asks.at[b, h], token.see_cache.at[b, h, rows], keys, stores[1], results, (b, h, part))


def _read_block(call: Call, counts: Counts, token: Token, memory: Store, results: Results) -> None:
    """The part of all heads that share a key head: they read its keys once, and who has read them appends to them."""
    part, h, b = (lax.axis_index(name) for name in ("part", "head", "batch"))
    of_block, at = part - (call.states + call.cached), part - call.states
    rows, fill = pl.ds(of_block * ROWS, ROWS), counts.fill[b]
    key_head = lax.div(h, jnp.int32(call.group))
    heads = [h + one for one in range(call.group)]

    @pl.when(of_block * ROWS >= fill)
    def _() -> None:
        for head in heads:
            results.totals[b, head, at], results.tops[b, head, at] = jnp.float32(0), jnp.float32(LEAST)

    @pl.when(of_block * ROWS < fill)
    def _() -> None:
        keys = _load(memory.block_keys.at[b, key_head, rows], OF_ROWS).astype(jnp.float32)
        for head in heads:
            values = memory.block_values.at[b, head, rows]
            _read(call, token.asks.at[b, head], token.see_block.at[b, rows], keys, values, results, (b, head, at))

    @pl.when(lax.div(fill, jnp.int32(ROWS)) == of_block)
    def _() -> None:
        one = OF_ROWS.reduce(0)
        _store(memory.block_keys.at[b, key_head, fill], _load(token.stored.at[b, key_head], one))
        for head in heads:
            _store(memory.block_values.at[b, head, fill], _load(token.value.at[b, head], one))


def _kernel(*refs: Any, call: Call, memory: Store) -> None:
    counts, token, results = Counts(*refs[:3]), Token(*refs[3:12]), Results(*refs[12:])
    part, h, b = (lax.axis_index(name) for name in ("part", "head", "batch"))
    real, of_cache = counts.real[b] > 0, part >= call.states
    of_block = part >= call.states + call.cached
    given = call, counts, token, memory, results
    pl.when(real & ~of_cache)(lambda: _through_state(*given))
    pl.when(real & of_cache & ~of_block)(lambda: _read_cache(*given))
    pl.when(real & of_block & (lax.rem(h, jnp.int32(call.group)) == 0))(lambda: _read_block(*given))


def launch(name: str, body: Any, out_type: Any, grid: dict[str, int], interpret: Any) -> Any:
    """A kernel under a name, one warpgroup to a thread block. Layouts of registers are said, not searched for."""
    return pl.kernel(
        body,
        out_type=out_type,
        mesh=plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid)),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=SUMS
        ),
        interpret=interpret or False,
        name=name,
    )


def bytes_moved(call: Call, filled: int) -> int:
    """By this kernel, where the running block holds so many tokens: S both ways, the parts that hold a row, what they come
    to, and the token's own rows."""
    item, width = jnp.dtype(call.dtype).itemsize, call.key_dim + call.value_dim
    parts = call.cached + -(-filled // ROWS)
    per_head = 2 * 4 * call.key_dim * call.value_dim + item * width * (ROWS * parts + 3)
    per_head += 4 * (parts * (call.value_dim + 2) + call.value_dim + call.states + 3 * call.key_dim + call.window)
    shared_keys = item * call.key_dim * ROWS * -(-filled // ROWS)
    return call.batch * (call.heads * per_head - (call.heads - call.key_heads) * shared_keys)


def run(call: Call, counts: Counts, token: Token, memory: Store) -> Results:
    """What the parts find. `memory` are references (`jax.new_ref`), whose arrays are changed."""
    parts, heads = call.cached + call.running, (call.batch, call.heads)

    def float32(*size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*heads, *size), jnp.float32)

    results = Results(
        float32(call.value_dim),
        float32(call.states),
        float32(parts, call.value_dim),
        float32(parts),
        float32(parts),
    )
    body = functools.partial(_kernel, call=call, memory=memory)
    grid = {"part": call.states + parts, "head": call.heads, "batch": call.batch}
    return Results(*launch("hola_step_token", body, list(results), grid, call.interpret)(*counts, *token))
