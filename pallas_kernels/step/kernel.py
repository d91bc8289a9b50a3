"""The kernel of one token: one row of the batch and one head per grid step.

What a token moves is the state, once each way, and the rows that it may read. Of the block, tokens lie in tiles of the
chip's memory, 32 bytes of each channel: the tile with the new token is written back, the rest is not. Cache rows are
written where a block is complete or a document begins. Products with one token are sums on the vector unit where they
are float32: a matrix unit would take six passes over the state for a single row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cache.arrays import Rows, Tokens
from pallas_kernels.cache.forward import merge
from pallas_kernels.cache.tiles import column, index
from pallas_kernels.delta_rule.chunk import norm_factor
from pallas_kernels.hola.layout import read_factor
from pallas_kernels.step.read import Weights, fetch, read_of, weigh

Part = Any


class Call(NamedTuple):
    """The sizes and choices of one call, all static."""

    batch: int
    heads: int
    key_heads: int
    block: int
    window: int
    key_dim: int
    value_dim: int
    scale: float
    share: float  # see `hola.layout.Call`
    residual: bool
    energy: float | None  # the share of its weights that the read keeps; None keeps all, and reads all values
    dtype: Any
    interpret: Any

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def tile(self) -> int:
        """Tokens of the smallest piece of the block that can be written."""
        return self.tile_of(self.block)

    def tile_of(self, rows: int) -> int:
        """Of so many rows, those of the smallest piece that can be moved."""
        most = 32 // jnp.dtype(self.dtype).itemsize
        return max(size for size in range(1, most + 1) if rows % size == 0)


class Counts(NamedTuple):
    """Of each row of the batch, int32."""

    real: Part  # whether the token is none of padding
    new: Part  # whether it begins a document
    position: Part  # its position
    first: Part  # the first place of the running block that it may see


class Numbers(NamedTuple):
    """Single numbers, float32, in scalar memory; [B * H] or [H]."""

    beta: Part
    log_decay: Part
    score: Part  # or None where the write's magnitude is the score
    sink: Part
    gate: Part


class Token(NamedTuple):
    q: Part  # [B, h, 1, K]
    k: Part  # [B, h, 1, K]
    v: Part  # [B, H, 1, V]
    query_scale: Part  # [H, 1, K]
    key_scale: Part  # [h, 1, K]


class Store(NamedTuple):
    """The memory, or a head's part of it."""

    state: Part  # [B, H, K, V] float32
    cache: Rows  # [B, H, W, ...], scores and positions as rows [1, W]
    block_keys: Part  # [B, h, C, K]
    block_values: Part  # [B, H, C, V]
    block_scores: Part  # [B, H, 1, C]


class OnChip(NamedTuple):
    cache: Rows
    tiles: tuple[Any, Any]  # of keys and values, with the new token
    zeros: tuple[Any, Any]  # a block of each
    done: Any  # semaphores of four copies, and one of all tiles that are fetched
    values: Any = None  # [C, V]: of the block, where they do not come by themselves


def _clean(x: Array) -> tuple[Array, Array]:
    """(a row without what is not finite, NaN [1, 1] where there was any and else 0)."""
    poison = jnp.sum(0.0 * x, axis=1, keepdims=True)  # 0 * x is NaN just where x is not finite
    return jnp.where(jnp.isnan(poison), 0.0, x), poison


def _through_state(
    q: Array,
    k: Array,
    v: Array,
    memory: Store,
    after: Store,
    beta: Array,
    decay: Array,
    new: Any,
    poison: Any,
    scale: float,
) -> Any:
    """(the state's answer [1, V], |e| [1, 1], NaN for a spoilt state or else 0); writes the state behind the token."""
    query, key = column(q * norm_factor(q)), column(k * norm_factor(k))
    state = jnp.where(new, 0.0, memory.state[...]) * jnp.exp(decay)
    error = v - jnp.sum(key * state, axis=0, keepdims=True)
    state = state + (beta * key) * error + poison
    after.state[...] = state
    answer = scale * jnp.sum(query * state, axis=0, keepdims=True)
    _, lost = _clean(error)  # e is not finite where anything of its column of S is not
    return answer, jnp.sqrt(jnp.sum(error * error, axis=1, keepdims=True)), lost + poison


def _fetch_values(
    call: Call, weights: Weights, memory: Store, after: Store, on_chip: OnChip, start: Any, complete: Any, new: Any
) -> list[Callable[[], None]]:
    """`fetch` of the cache's values and the block's. The tile of the new token, which is written meanwhile, is here
    already: the grid brings it."""
    head, done = (pl.program_id(0), pl.program_id(1)), on_chip.done.at[4]
    place = index((1, call.block), 1)
    others = jnp.where((place >= start) & (place < start + call.tile), 0.0, weights.block)
    cached, tile = after.cache.values.at[head], call.tile_of(call.window)
    waits = fetch(weights.cache, cached, on_chip.cache.values, tile, complete & ~new, done)
    waits += fetch(others, after.block_values.at[head], on_chip.values, call.tile, complete, done)

    @pl.when(~complete)
    def _() -> None:
        on_chip.values[pl.ds(start, call.tile), :] = memory.block_values[...]

    return waits


def _kernel(*refs: Any, call: Call) -> None:
    counts, (numbers, token, memory, out, after, on_chip) = Counts(*refs[:4]), refs[4:]
    b, h = pl.program_id(0), pl.program_id(1)
    head, fill = b * call.heads + h, lax.rem(counts.position[b], jnp.int32(call.block))
    real, new = counts.real[b] > 0, counts.new[b] > 0
    complete = real & (fill == call.block - 1)
    last_of_group = lax.rem(h, jnp.int32(call.group)) == call.group - 1
    apart = call.energy is not None  # values are fetched when it is known which
    block_values = on_chip.values if apart else memory.block_values

    (q, asked), (k, poison), (v, of_value) = (_clean(x[...].astype(jnp.float32)) for x in token[:3])
    query = (q * read_factor(q, call.share) * token.query_scale[...]).astype(call.dtype)
    key = (k * read_factor(k, call.share) * token.key_scale[...]).astype(call.dtype)
    value = v.astype(call.dtype)
    beta, decay = (jnp.where(real, x[head], 0.0) for x in numbers[:2])
    poison = jnp.where(real, poison + of_value, 0.0) + 0.0 * (beta + decay)

    # The tile with the new token goes out while the rest is at work. Heads that share a key head read it first.
    start = pl.multiple_of(fill - lax.rem(fill, jnp.int32(call.tile)), call.tile)
    own, at = index((call.tile, 1), 0) == fill - start, pl.ds(start, call.tile)
    olds = memory.block_keys[at, :], memory.block_values[...] if apart else memory.block_values[at, :]
    key_head = lax.div(h, jnp.int32(call.group))
    stores = (after.block_keys.at[b, key_head], after.block_values.at[b, h])
    copies = []
    for tile, old, row, store, done in zip(on_chip.tiles, olds, (key, value), stores, (0, 1), strict=True):
        tile[...] = jnp.where(own, row, old)
        copies.append(pltpu.make_async_copy(tile, store.at[at], on_chip.done.at[done]))
    appends = (real & ~complete & last_of_group, real & ~complete)
    for append, copy in zip(appends, copies, strict=True):
        pl.when(append)(copy.start)

    cache, given = on_chip.cache, memory.cache
    for mine, theirs, empty in zip(cache, given, Rows(0, 0, -jnp.inf, -1), strict=True):
        if not (apart and mine is cache.values):
            mine[...] = jnp.where(new, jnp.full_like(theirs, empty), theirs[...])
    places = index((1, call.block), 1)
    here, seen = places == fill, (places <= fill) & (places >= counts.first[b])
    weights = weigh(query, key, memory.block_keys, cache, seen, here, numbers.sink[h], call.energy)
    waits = _fetch_values(call, weights, memory, after, on_chip, start, complete, new) if apart else []
    answer, norm, spoilt = _through_state(q, k, v, memory, after, beta, decay, new, poison, call.scale)
    for wait in waits:
        wait()
    read = read_of(weights, value, cache, block_values, here)
    out[...] = jnp.where(real, answer + numbers.gate[h] * read + spoilt + asked, 0.0).astype(out.dtype)
    magnitude = norm if call.residual else beta * norm
    score = jnp.where(jnp.isnan(spoilt), 0.0, magnitude if numbers.score is None else numbers.score[head])
    scores = jnp.where(here & real, score, memory.block_scores[...])
    after.block_scores[...] = jnp.where(complete, 0.0, scores)

    @pl.when(complete)
    def _() -> None:
        own = index((call.block, 1), 0) == fill
        keys, values = (
            jnp.where(own, row, rows[...]) for row, rows in ((key, memory.block_keys), (value, block_values))
        )
        tokens = Tokens(None, keys, values, jnp.where(seen, scores, -jnp.inf), None)
        merge(tokens, cache, 0, 0, counts.position[b] - fill, None)

    after.cache.scores[...], after.cache.positions[...] = cache.scores[...], cache.positions[...]

    @pl.when(complete | new)
    def _() -> None:
        rows = [
            pltpu.make_async_copy(mine, theirs.at[b, h], on_chip.done.at[done])
            for mine, theirs, done in zip(cache[:2], after.cache[:2], (2, 3), strict=True)
        ]
        for copy in rows:
            copy.start()
        for copy in rows:
            copy.wait()

    for zeros, store, empties, done in zip(
        on_chip.zeros, stores, (complete & last_of_group, complete), (0, 1), strict=True
    ):

        @pl.when(empties)
        def _(zeros: Any = zeros, store: Any = store, done: int = done) -> None:
            zeros[...] = jnp.zeros_like(zeros)
            copy = pltpu.make_async_copy(zeros, store, on_chip.done.at[done])
            copy.start()
            copy.wait()

    for append, copy in zip(appends, copies, strict=True):
        pl.when(append)(copy.wait)


def _specs(call: Call, with_score: bool) -> tuple[Numbers, Token, Store]:
    def key_head(h: Any) -> Any:
        return lax.div(h, jnp.int32(call.group))  # `//` asks for signs, which Mosaic lowers for known chips alone

    def of_head(*size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *size), lambda b, h, *_: (b, h, 0, 0))

    def of_key_head(*size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *size), lambda b, h, *_: (b, key_head(h), 0, 0))

    window, block, key_dim, value_dim = call.window, call.block, call.key_dim, call.value_dim
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    token = Token(
        of_key_head(1, key_dim),
        of_key_head(1, key_dim),
        of_head(1, value_dim),
        pl.BlockSpec((None, 1, key_dim), lambda b, h, *_: (h, 0, 0)),
        pl.BlockSpec((None, 1, key_dim), lambda b, h, *_: (key_head(h), 0, 0)),
    )
    rows = Rows(of_head(window, key_dim), of_head(window, value_dim), of_head(1, window), of_head(1, window))
    block_values = of_head(block, value_dim)
    if call.energy is not None:  # of the block's values the tile of the new token

        def tile(b: Any, h: Any, *counts: Any) -> Any:
            fill = lax.rem(Counts(*counts).position[b], jnp.int32(block))
            return b, h, lax.div(fill, jnp.int32(call.tile)), 0

        rows = rows._replace(values=pl.BlockSpec(memory_space=pl.ANY))
        block_values = pl.BlockSpec((None, None, call.tile, value_dim), tile)
    store = Store(of_head(key_dim, value_dim), rows, of_key_head(block, key_dim), block_values, of_head(1, block))
    return Numbers(scalars, scalars, scalars if with_score else None, scalars, scalars), token, store


def run(call: Call, counts: Counts, numbers: Numbers, token: Token, memory: Store) -> tuple[Array, Store]:
    """What the memory answers [B, H, 1, V], and the memory behind the token, in the arrays that it came in."""
    number_specs, token_specs, specs = _specs(call, numbers.score is not None)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    after_specs = specs._replace(
        cache=specs.cache._replace(keys=anywhere, values=anywhere), block_keys=anywhere, block_values=anywhere
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (token.v, memory))
    first = len(counts) + len(jax.tree.leaves((numbers, token)))
    keys, values = (call.block, call.key_dim), (call.block, call.value_dim)
    cache = Rows(
        pltpu.VMEM((call.window, call.key_dim), call.dtype),
        pltpu.VMEM((call.window, call.value_dim), call.dtype),
        pltpu.VMEM((1, call.window), jnp.float32),
        pltpu.VMEM((1, call.window), jnp.int32),
    )
    on_chip = OnChip(
        cache,
        (pltpu.VMEM((call.tile, call.key_dim), call.dtype), pltpu.VMEM((call.tile, call.value_dim), call.dtype)),
        (pltpu.VMEM(keys, call.dtype), pltpu.VMEM(values, call.dtype)),
        pltpu.SemaphoreType.DMA((5,)),
        None if call.energy is None else pltpu.VMEM(values, call.dtype),
    )
    moved = bytes_moved(call)
    steps = call.batch * call.heads
    return pl.pallas_call(
        functools.partial(_kernel, call=call),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(counts),
            grid=(call.batch, call.heads),
            in_specs=[number_specs, token_specs, specs],
            out_specs=(token_specs.v, after_specs),
            scratch_shapes=[on_chip],
        ),
        input_output_aliases={first + at: 1 + at for at in range(len(jax.tree.leaves(memory)))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=steps * 2 * (3 * call.key_dim * call.value_dim + sum(keys) * (call.block + call.window)),
            transcendentals=steps * (call.block + call.window),
            bytes_accessed=moved,
        ),
        interpret=call.interpret,
        name="hola_step",
    )(*counts, numbers, token, memory)


def bytes_moved(call: Call, fetched: float = 1.0) -> int:
    """Of a token in the midst of a block, for the whole batch: states both ways, the rows that are read, the tiles that are
    written. A complete block writes the cache's rows and the empty block beside. `fetched` is the share of the values that
    come where not all do: at least the tile of the new token."""
    item, width = jnp.dtype(call.dtype).itemsize, call.key_dim + call.value_dim
    per_head = 2 * 4 * call.key_dim * call.value_dim
    per_head += item * (call.window * call.key_dim + call.tile * width + 2 * call.value_dim)
    per_head += round(item * max(call.tile, fetched * (call.window + call.block)) * call.value_dim)
    per_head += 4 * (4 * call.window + 2 * call.block)
    per_key_head = item * call.key_dim * (call.block + 2)
    return call.batch * (call.heads * per_head + call.key_heads * per_key_head)
