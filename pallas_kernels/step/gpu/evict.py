"""The kernel of a block's end: of cache and block the W best rows stay, and the block is empty.

It runs behind every token and returns at once where no block is complete. A conditional of XLA's would do as well but that
the host reads its condition first, and waits for the device, once a layer.

A thread block has 64 columns of all rows: rows are ranked by comparing all pairs of scores, and moved by products with ones
and zeros, which are exact. All rows are read before the first is written.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.delta_rule.gpu import tensor_core as tc
from pallas_kernels.step.gpu.kernel import Call, Store, launch

TILE = tc.TILE


class Room(NamedTuple):
    """Shared memory."""

    rows: Any  # that compete
    moves: Any  # [slot, row], 1 where the row gets the slot
    kept: Any  # the new cache
    ready: Any


def _index(axis: int) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=tc.LAYOUT)


def _ranks(scores: Any, tile: Any, tiles: int) -> tuple[Array, Array]:
    """(how many rows stand before each of a tile's, their scores), along the columns of a square."""
    mine = tc.by_column(plgpu.load(scores.at[pl.ds(tile * TILE, TILE)], layout=tc.LAYOUT.reduce(0), optimized=False))
    first = _index(1) + (tile * TILE - _index(0))  # how far behind my row theirs would have to stand, to come later

    def beaten(other: Any, count: Array) -> Array:
        theirs = plgpu.load(scores.at[pl.ds(other * TILE, TILE)], layout=tc.LAYOUT.reduce(1), optimized=False)
        theirs = tc.by_row(theirs)
        before = (theirs > mine) | ((theirs == mine) & (first > other * TILE))
        return count + jnp.where(before, 1.0, 0.0)

    count = jnp.sum(lax.fori_loop(0, tiles, beaten, tc.zeros()), axis=0)
    return tc.by_column(count), mine


def _kernel(*refs: Any, call: Call, memory: Store) -> None:
    complete, scores, chosen = refs
    part, key_head, b = (lax.axis_index(name) for name in ("part", "head", "batch"))
    keys, values = call.key_dim // TILE, call.value_dim // TILE

    def allot(body: Any) -> None:
        tiles, barrier = tc.tiles, plgpu.Barrier(num_arrivals=1)
        pl.run_scoped(lambda *room: body(Room(*room)), tiles(), tiles(), tiles(call.window // TILE), barrier)

    def of_keys(room: Room) -> None:
        columns, block = pl.ds(part * TILE, TILE), memory.block_keys.at[b, key_head]
        for one in range(call.group):
            h = key_head * call.group + one
            _keep(call, scores.at[b, h], memory.cache_keys.at[b, h], block, columns, room, None)
        _clear(call, block, columns)

    def of_values(room: Room) -> None:
        mine = part - keys
        h, tile = key_head * call.group + lax.div(mine, jnp.int32(values)), lax.rem(mine, jnp.int32(values))
        columns, block = pl.ds(tile * TILE, TILE), memory.block_values.at[b, h]
        tell = chosen.at[b, h], tile == 0
        _keep(call, scores.at[b, h], memory.cache_values.at[b, h], block, columns, room, tell)
        _clear(call, block, columns)

    @pl.when(complete[b] > 0)
    def _() -> None:
        pl.when(part < keys)(lambda: allot(of_keys))
        pl.when(part >= keys)(lambda: allot(of_values))


def _keep(call: Call, scores: Any, cache: Any, block: Any, columns: Any, room: Room, tell: Any) -> None:
    """Moves rows, and tells which, counted from 1, where that is asked for."""
    in_cache, tiles = call.window // TILE, (call.window + call.block) // TILE

    def slot_tile(slots: Any, _: None) -> None:
        def row_tile(tile: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            kept, places = carry

            @pl.when(tile < in_cache)
            def _() -> None:
                plgpu.copy_gmem_to_smem(cache.at[pl.ds(tile * TILE, TILE), columns], room.rows, room.ready)

            @pl.when(tile >= in_cache)
            def _() -> None:
                rows = pl.ds((tile - in_cache) * TILE, TILE)
                plgpu.copy_gmem_to_smem(block.at[rows, columns], room.rows, room.ready)

            rank, score = _ranks(scores, tile, tiles)
            slot = (_index(0) + slots * TILE).astype(jnp.float32)
            moves = (rank == slot) & (score > -jnp.inf)
            room.moves[...] = jnp.where(moves, 1.0, 0.0).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.barrier_wait(room.ready)
            kept = kept + tc.product((room.moves, room.rows), room=None)
            place = (_index(1) + (tile * TILE + 1)).astype(jnp.float32)
            return kept, places + jnp.sum(jnp.where(moves, place, 0.0), axis=1)

        none = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), tc.LAYOUT.reduce(1))
        kept, places = lax.fori_loop(0, tiles, row_tile, (tc.zeros(), none))
        room.kept[slots] = kept.astype(jnp.bfloat16)
        if tell is not None:
            target, asked = tell

            @pl.when(asked)
            def _() -> None:
                plgpu.store(target.at[pl.ds(slots * TILE, TILE)], places.astype(jnp.int32), optimized=False)

    lax.fori_loop(0, in_cache, slot_tile, None)
    plgpu.commit_smem()
    for slots in range(in_cache):
        plgpu.copy_smem_to_gmem(room.kept.at[slots], cache.at[pl.ds(slots * TILE, TILE), columns])
    plgpu.wait_smem_to_gmem(0)


def _clear(call: Call, block: Any, columns: Any) -> None:
    def tile(at: Any, _: None) -> None:
        plgpu.store(block.at[pl.ds(at * TILE, TILE), columns], tc.zeros().astype(jnp.bfloat16), optimized=False)

    lax.fori_loop(0, call.block // TILE, tile, None)


def bytes_moved(call: Call) -> int:
    """By this kernel, where all rows of the batch complete a block: their rows read, and written."""
    item, rows = jnp.dtype(call.dtype).itemsize, 2 * (call.window + call.block)
    values, keys = call.heads * rows * call.value_dim, (2 * call.heads * call.window + 2 * call.key_heads * call.block)
    return call.batch * item * (values + keys * call.key_dim)


def run(call: Call, complete: Array, scores: Array, memory: Store) -> Array:
    """For rows of the batch that are `complete` [B]: the cache, and the block, in `memory`, whose arrays are changed; and
    [B, H, W] which rows of [cache | block] the cache has now, counted from 1, 0 for none; undefined for other rows.
    `scores` [B, H, W + C], -inf for what does not compete."""
    parts = call.key_dim // TILE + call.group * (call.value_dim // TILE)
    grid = {"part": parts, "head": call.key_heads, "batch": call.batch}
    chosen = jax.ShapeDtypeStruct((call.batch, call.heads, call.window), jnp.int32)
    body = functools.partial(_kernel, call=call, memory=memory)
    return launch("hola_step_evict", body, [chosen], grid, call.interpret)(complete, scores)[0]
