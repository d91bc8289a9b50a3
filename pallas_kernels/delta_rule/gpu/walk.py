"""The second kernel: chunks in order, S in registers, 64 value columns to a block of threads.

All is transposed, [V, c] and [V, K]: S' and whatever is made of it are left operands, which the tensor cores take from
registers, and k and the matrices right ones, which they take from where the copies put them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.delta_rule.chunk import CHUNK
from pallas_kernels.delta_rule.gpu import team
from pallas_kernels.delta_rule.gpu import tensor_core as tc
from pallas_kernels.delta_rule.gpu.matrices import Matrices
from pallas_kernels.delta_rule.gpu.shapes import Call
from pallas_kernels.delta_rule.gpu.team import SLOTS

ROWS = 3  # factors that predict, and that write; what is left of the state


class Given(NamedTuple):
    k: Any  # [B, T, h * K]
    v: Any  # [B, T, H * V]
    solve_high: Any
    solve_low: Any
    rows: Any  # [B, H, n, ROWS, c]
    initial: Any  # [B, H, V, K]


class Results(NamedTuple):
    writes: Any  # [B, T, H * V] the committed residuals beta e
    squares: Any  # [B, H, n, V / 64, c]: of the same, summed over 64 columns, before they were rounded
    before: Any  # [B, H, n, V, K] the state before each chunk
    final: Any  # [B, H, V, K]


class Room(NamedTuple):
    """Shared memory; a slot for each chunk under way."""

    k: Any
    v: Any
    solve: Any
    rows: Any
    norms: Any
    loaded: Any
    meeting: Any


def _fetch(call: Call, given: Given, room: Room, n: Any) -> None:
    """Starts the copies of a chunk."""
    tile, h, b = (lax.axis_index(name) for name in ("tile", "h", "b"))
    slot, tokens, key_head = lax.rem(n, SLOTS), pl.ds(n * CHUNK, CHUNK), lax.div(h, call.group)
    arrived = room.loaded.at[slot]
    for at in range(call.key_tiles):
        part = pl.ds(key_head * call.key_dim + at * tc.TILE, tc.TILE)
        plgpu.copy_gmem_to_smem(given.k.at[b, tokens, part], room.k.at[slot, at], arrived)
    part = pl.ds(h * call.value_dim + tile * tc.TILE, tc.TILE)
    plgpu.copy_gmem_to_smem(given.v.at[b, tokens, part], room.v.at[slot], arrived)
    for at, ref in enumerate((given.solve_high, given.solve_low)):
        plgpu.copy_gmem_to_smem(ref.at[b, h, n], room.solve.at[slot, at], arrived)
    plgpu.copy_gmem_to_smem(given.rows.at[b, h, n], room.rows.at[slot], arrived)


def _kernel(*refs: Any, call: Call) -> None:
    given, results, room = Given(*refs[:6]), Results(*refs[6:10]), Room(*refs[10:])
    tile, h, b = (lax.axis_index(name) for name in ("tile", "h", "b"))
    member = team.Member(call, room.meeting)
    columns = pl.ds(tile * tc.TILE, tc.TILE)
    part = pl.ds(h * call.value_dim + tile * tc.TILE, tc.TILE)
    multiply = functools.partial(tc.product, room=member.room)

    @member.one(0)
    def _() -> None:
        for n in range(min(SLOTS, call.chunks)):
            _fetch(call, given, room, jnp.int32(n))

    def chunk(n: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slot = lax.rem(n, SLOTS)
        plgpu.barrier_wait(room.loaded.at[slot])
        v, rows = room.v.at[slot], room.rows.at[slot]
        keys = [room.k.at[slot, member.first + at] for at in range(member.held)]
        solve = [tc.transposed(room.solve.at[slot, at]) for at in range(2)]

        predicting = []
        for at, piece in enumerate(state):
            high, low = tc.split(piece)
            member.send(high, results.before.at[b, h, n, columns, member.keys(at)])
            predicting += [(high, tc.transposed(keys[at])), (low, tc.transposed(keys[at]))]
        predicted = member.shared(multiply(*predicting)) * tc.by_column(tc.along_columns(rows.at[0]))
        values = [(tc.transposed(v), x) for x in solve]
        write = multiply(*values, *tc.three_pass(-predicted, *solve))

        @member.one(0)
        def _() -> None:
            member.send(write.astype(jnp.bfloat16), results.writes.at[b, pl.ds(n * CHUNK, CHUNK), part], flip=True)

        @member.one(team.size(call) - 1)
        def _() -> None:
            room.norms[...] = jnp.sum(write * write, axis=0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(room.norms, results.squares.at[b, h, n, tile])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        left = tc.split(write * tc.by_column(tc.along_columns(rows.at[1])))
        keep = tc.by_row(tc.along_rows(rows.at[2]))
        after = [piece * keep + multiply(*((x, key) for x in left)) for piece, key in zip(state, keys, strict=True)]
        member.finished()

        @member.one(0)
        def _() -> None:
            @pl.when(n + SLOTS < call.chunks)
            def _() -> None:
                _fetch(call, given, room, n + SLOTS)

        return tuple(after)

    def piece(ref: Any, at: int) -> Any:
        return ref.at[b, h, columns, member.keys(at)]

    state = tuple(plgpu.load(piece(given.initial, at), layout=tc.LAYOUT, optimized=False) for at in range(member.held))
    state = lax.fori_loop(0, call.chunks, chunk, state)
    for at, value in enumerate(state):
        piece(results.final, at)[...] = value
    plgpu.wait_smem_to_gmem(0)


def run(call: Call, k: Any, v: Any, matrices: Matrices, rows: Any, initial: Any) -> Results:
    """All chunks of all heads."""
    return Results(
        *tc.launch(
            "delta_rule_states",
            functools.partial(_kernel, call=call),
            out_type=list(
                Results(call.values(jnp.bfloat16), call.rows(call.value_tiles), call.states(), call.state()),
            ),
            scratch_types=list(
                Room(
                    k=tc.tiles(SLOTS, call.key_tiles),
                    v=tc.tiles(SLOTS),
                    solve=tc.tiles(SLOTS, 2),
                    rows=plgpu.SMEM((SLOTS, ROWS, CHUNK), jnp.float32),
                    norms=plgpu.SMEM((CHUNK,), jnp.float32),
                    loaded=plgpu.Barrier(num_arrivals=call.key_tiles + 4, num_barriers=SLOTS),
                    meeting=team.meeting(call),
                )
            ),
            grid={"tile": call.value_tiles, "h": call.heads, "b": call.batch},
            interpret=call.interpret,
            **team.threads(call),
        )(k, v, matrices.solve_high, matrices.solve_low, rows, initial)
    )
