"""The kernel of one token: a thread block takes a few columns of S, or a few rows of what may be read.

All of it is one pass over memory, so the parts of a head are many and small, at most 32 KB: a single row of 4 heads is at
work on dozens of multiprocessors, and of many rows four parts share one, whose loads are all under way at once. Loads go
to registers, whole lines of 128 bytes; each number is used once, so shared memory would gain nothing.

Columns of S are independent of each other, but for |e|, whose squares are summed over parts outside. Rows are read as in
flash decoding: each part has a maximum, a sum and a mean of its own, and they are put together outside, in arrays
that are a hundredth of what was read. The read does not wait for the score: it matters where a block is complete. Every part
normalises the token for itself: a few sums of 256 numbers, where another kernel would have to be started.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

EPSILON = 1e-6
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
    share: float  # of |x|^2, in the norm of keys and queries that are read with
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

    document: Any  # the token's; 0 is padding, whose row is left alone
    before: Any  # the memory's
    start: Any  # at which position that began
    position: Any


class Token(NamedTuple):
    q: Any  # [B, h, K]
    k: Any  # [B, h, K]
    v: Any  # [B, H, V]
    beta: Any  # [B, H] float32
    log_decay: Any  # [B, H] float32
    query_scale: Any  # [H, K] float32
    key_scale: Any  # [h, K] float32
    cache_scores: Any  # [B, H, W] float32; -inf where a row is empty


class Store(NamedTuple):
    """The memory's large arrays, which are changed in place."""

    state: Any  # [B, H, K, V] float32
    cache_keys: Any  # [B, H, W, K]
    cache_values: Any  # [B, H, W, V]
    block_keys: Any  # [B, h, C, K]
    block_values: Any  # [B, H, C, V]


class Results(NamedTuple):
    """Undefined at rows of padding. A part that sees nothing has total 0 and, of `means`, nothing."""

    answer: Any  # [B, H, V] float32: of S; NaN where the query is not finite
    squares: Any  # [B, H, parts]: of e, summed over a part's columns; NaN where S or what is written is not finite
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


def _poison(x: Array) -> Array:
    """NaN where anything of a vector is not finite, and else 0."""
    return jnp.sum(0.0 * x)


def _clean(x: Array) -> Array:
    """The vector, or zeros where anything of it is not finite."""
    poison = _poison(x) + 0.0 * x  # of the vector's layout
    return jnp.where(poison == poison, x, 0.0)


def _unit(x: Array, share: float) -> Array:
    """x / sqrt(share |x|^2 + 1e-6)."""
    return x * lax.rsqrt(share * jnp.sum(x * x) + EPSILON)


class Here(NamedTuple):
    """Where a thread block stands, and how the token stands to the memory."""

    call: Call
    part: Any
    h: Any
    b: Any
    real: Any
    new: Any
    fill: Any  # the token's place in the running block
    first: Any  # the first place there that it may see

    @classmethod
    def find(cls, call: Call, counts: Counts) -> Here:
        part, h, b = (lax.axis_index(name) for name in ("part", "head", "batch"))
        document, position = counts.document[b], counts.position[b]
        new, fill = document != counts.before[b], lax.rem(position, jnp.int32(call.block))
        first = jnp.where(new, fill, counts.start[b] - (position - fill))
        return cls(call, part, h, b, document > 0, new, fill, first)

    @property
    def key_head(self) -> Any:
        return lax.div(self.h, jnp.int32(self.call.group))


def _through_state(here: Here, token: Token, memory: Store, results: Results) -> None:
    call, part, h, b = here.call, here.part, here.h, here.b
    shape, columns = (call.key_dim, call.columns), pl.ds(part * call.columns, call.columns)
    along_keys, along_values = OF_STATE.reduce(1), OF_STATE.reduce(0)
    place = memory.state.at[b, h, :, columns]
    state = lax.cond(
        here.new,
        lambda: plgpu.layout_cast(jnp.zeros(shape, jnp.float32), OF_STATE),
        lambda: _load(place, OF_STATE),
    )
    beta, log_decay = token.beta[b, h], token.log_decay[b, h]
    q, k = (_load(x.at[b, here.key_head], along_keys).astype(jnp.float32) for x in (token.q, token.k))
    spoilt = _poison(k) + _poison(_load(token.v.at[b, h], along_values).astype(jnp.float32)) + 0.0 * (beta + log_decay)
    key = _spread(_unit(k, 1.0), shape, OF_STATE, 0)
    value = _load(token.v.at[b, h, columns], along_values).astype(jnp.float32)
    state = state * jnp.exp(log_decay)
    error = value - jnp.sum(key * state, axis=0)
    state = state + key * _spread(error * (beta + spoilt), shape, OF_STATE, 1)
    _store(place, state)
    query = _spread(_unit(q, 1.0), shape, OF_STATE, 0)
    _store(results.answer.at[b, h, columns], call.scale * jnp.sum(query * state, axis=0))
    # 0 * x is NaN just where x is not finite; e is, where anything of its column of S is not.
    results.squares[b, h, part] = jnp.sum(error * error + 0.0 * error) + spoilt


class Asking(NamedTuple):
    """Of one head."""

    query: Array  # [K]
    own: Array  # the logit of the token itself, -inf for a part that does not hold it
    value: Array  # [V], the token's


def _asking(here: Here, token: Token, h: Any, stored: Array, holds: Any) -> Asking:
    one, b = OF_ROWS.reduce(0), here.b
    query = _unit(_load(token.q.at[b, here.key_head], one).astype(jnp.float32), here.call.share)
    query = (query * _load(token.query_scale.at[h], one)).astype(here.call.dtype).astype(jnp.float32)
    own = jnp.where(holds, jnp.sum(query * stored), -jnp.inf)
    return Asking(query, own, _clean(_load(token.v.at[b, h], one).astype(jnp.float32)))


def _stored_key(here: Here, token: Token) -> Array:
    """[K], as it is stored, in float32."""
    one = OF_ROWS.reduce(0)
    key = _unit(_clean(_load(token.k.at[here.b, here.key_head], one).astype(jnp.float32)), here.call.share)
    key = key * _load(token.key_scale.at[here.key_head], one)
    return key.astype(here.call.dtype).astype(jnp.float32)


def _read(call: Call, asking: Asking, keys: Array, values: Any, visible: Array, results: Any) -> None:
    """What one head reads of a part's rows, and of the token itself; `keys` are in registers, `values` are not."""
    of_keys, of_values = (ROWS, call.key_dim), (ROWS, call.value_dim)
    values = _load(values, OF_ROWS).astype(jnp.float32)
    logits = jnp.sum(keys * _spread(asking.query, of_keys, OF_ROWS, 1), axis=1)
    logits = jnp.where(visible, logits, -jnp.inf)
    top = jnp.maximum(jnp.maximum(jnp.max(logits), asking.own), LEAST)
    weights, own = jnp.exp(logits - top), jnp.exp(asking.own - top)
    mean, top_of_part, total = results
    _tell(top_of_part, top)
    _tell(total, jnp.sum(weights) + own)
    _store(mean, jnp.sum(values * _spread(weights, of_values, OF_ROWS, 0), axis=0) + own * asking.value)


def _tell(place: tuple[Any, Any], number: Any) -> None:
    """Writes a single number."""
    ref, at = place
    ref[at] = number


def _of_part(results: Results, *at: Any) -> Any:
    """Where a part's mean, top and total go."""
    return results.means.at[at], (results.tops, at), (results.totals, at)


def _nothing(results: Results, *at: Any) -> None:
    """A part that sees nothing."""
    _, top, total = _of_part(results, *at)
    _tell(top, jnp.float32(LEAST))
    _tell(total, jnp.float32(0))


def _read_cache(here: Here, token: Token, memory: Store, results: Results) -> None:
    call, h, b, part = here.call, here.h, here.b, here.part - here.call.states
    rows = pl.ds(part * ROWS, ROWS)
    keys, values = memory.cache_keys.at[b, h, rows], memory.cache_values.at[b, h, rows]

    @pl.when(here.new)
    def _() -> None:
        _nothing(results, b, h, part)
        for store, width in ((keys, call.key_dim), (values, call.value_dim)):
            _store(store, plgpu.layout_cast(jnp.zeros((ROWS, width), call.dtype), OF_ROWS))

    @pl.when(~here.new)
    def _() -> None:
        visible = _load(token.cache_scores.at[b, h, rows], OF_ROWS.reduce(1)) > -jnp.inf
        asking = _asking(here, token, h, _stored_key(here, token), False)
        held = _load(keys, OF_ROWS).astype(jnp.float32)
        _read(call, asking, held, values, visible, _of_part(results, b, h, part))


def _read_block(here: Here, token: Token, memory: Store, results: Results) -> None:
    """The part of all heads that share a key head: they read its keys once, and who has read them appends to them."""
    call, b, fill, key_head = here.call, here.b, here.fill, here.key_head
    part, at = here.part - (call.states + call.cached), here.part - call.states
    rows = pl.ds(part * ROWS, ROWS)
    heads = [here.h + one for one in range(call.group)]

    @pl.when(part * ROWS > fill)
    def _() -> None:
        for h in heads:
            _nothing(results, b, h, at)

    @pl.when(part * ROWS <= fill)
    def _() -> None:
        keys = _load(memory.block_keys.at[b, key_head, rows], OF_ROWS).astype(jnp.float32)
        place = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=OF_ROWS.reduce(1)) + part * ROWS
        visible, stored = (place < fill) & (place >= here.first), _stored_key(here, token)
        holds = lax.div(fill, jnp.int32(ROWS)) == part
        asking = [_asking(here, token, h, stored, holds) for h in heads]
        for h, one in zip(heads, asking, strict=True):
            _read(call, one, keys, memory.block_values.at[b, h, rows], visible, _of_part(results, b, h, at))

        @pl.when(holds)
        def _() -> None:
            _store(memory.block_keys.at[b, key_head, fill], stored.astype(call.dtype))
            for h, one in zip(heads, asking, strict=True):
                _store(memory.block_values.at[b, h, fill], one.value.astype(call.dtype))


def _kernel(*refs: Any, call: Call, memory: Store) -> None:
    counts, token, results = Counts(*refs[:4]), Token(*refs[4:12]), Results(*refs[12:])
    here = Here.find(call, counts)
    of_cache, of_block = here.part >= call.states, here.part >= call.states + call.cached
    given = here, token, memory, results
    pl.when(here.real & ~of_cache)(lambda: _through_state(*given))
    pl.when(here.real & of_cache & ~of_block)(lambda: _read_cache(*given))
    pl.when(here.real & of_block & (lax.rem(here.h, jnp.int32(call.group)) == 0))(lambda: _read_block(*given))


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
