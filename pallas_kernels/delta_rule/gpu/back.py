"""The fourth kernel: the state's gradient D, carried in registers along the chunks from last to first.

Transposed like the walk forward, D' [V, K] by 64 value columns and a warpgroup's part of the keys. What it is given of a
gradient is rounded to bfloat16 in products; D itself is float32.
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
from pallas_kernels.delta_rule.gpu.shapes import Call
from pallas_kernels.delta_rule.gpu.team import SLOTS

ROWS = 4  # factors that write, read and predict (beta among them); what is left of the state


class Given(NamedTuple):
    q: Any  # [B, T, h * K]
    k: Any
    d_out: Any  # [B, T, H * V] bfloat16
    attend: Any  # [B, H, n, c, c]
    inverse: Any
    rows: Any  # [B, H, n, ROWS, c]
    d_final: Any  # [B, H, V, K]


class Results(NamedTuple):
    d_rest: Any  # [B, T, H * V]: the gradient of beta (v - what is predicted)
    d_after: Any  # [B, H, n, V, K]: of the state behind each chunk
    d_initial: Any  # [B, H, V, K]


class Room(NamedTuple):
    """Shared memory; a slot for each chunk under way."""

    q: Any
    k: Any
    d_out: Any
    pairs: Any  # attend, inverse
    rows: Any
    loaded: Any
    meeting: Any


def _fetch(call: Call, given: Given, room: Room, turn: Any) -> None:
    """Starts the copies of a chunk, of which the last comes first."""
    tile, h, b = (lax.axis_index(name) for name in ("tile", "h", "b"))
    n, slot, key_head = call.chunks - 1 - turn, lax.rem(turn, SLOTS), lax.div(h, call.group)
    tokens, arrived = pl.ds(n * CHUNK, CHUNK), room.loaded.at[slot]
    for ref, place in ((given.q, room.q), (given.k, room.k)):
        for at in range(call.key_tiles):
            part = pl.ds(key_head * call.key_dim + at * tc.TILE, tc.TILE)
            plgpu.copy_gmem_to_smem(ref.at[b, tokens, part], place.at[slot, at], arrived)
    part = pl.ds(h * call.value_dim + tile * tc.TILE, tc.TILE)
    plgpu.copy_gmem_to_smem(given.d_out.at[b, tokens, part], room.d_out.at[slot], arrived)
    for at, ref in enumerate((given.attend, given.inverse)):
        plgpu.copy_gmem_to_smem(ref.at[b, h, n], room.pairs.at[slot, at], arrived)
    plgpu.copy_gmem_to_smem(given.rows.at[b, h, n], room.rows.at[slot], arrived)


def _kernel(*refs: Any, call: Call) -> None:
    given, results, room = Given(*refs[:7]), Results(*refs[7:10]), Room(*refs[10:])
    tile, h, b = (lax.axis_index(name) for name in ("tile", "h", "b"))
    member = team.Member(call, room.meeting)
    columns = pl.ds(tile * tc.TILE, tc.TILE)
    part = pl.ds(h * call.value_dim + tile * tc.TILE, tc.TILE)
    multiply = functools.partial(tc.product, room=member.room)

    @member.one(0)
    def _() -> None:
        for turn in range(min(SLOTS, call.chunks)):
            _fetch(call, given, room, jnp.int32(turn))

    def chunk(turn: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        n, slot = call.chunks - 1 - turn, lax.rem(turn, SLOTS)
        plgpu.barrier_wait(room.loaded.at[slot])
        d_out, rows = room.d_out.at[slot], room.rows.at[slot]
        attend, inverse = (room.pairs.at[slot, at] for at in range(2))
        keys, queries = ([x.at[slot, member.first + at] for at in range(member.held)] for x in (room.k, room.q))

        def factor(at: int) -> jax.Array:
            return tc.by_column(tc.along_columns(rows.at[at]))

        written = []
        for at, piece in enumerate(state):
            rounded = piece.astype(jnp.bfloat16)
            member.send(rounded, results.d_after.at[b, h, n, columns, member.keys(at)])
            written.append((rounded, tc.transposed(keys[at])))
        d_write = member.shared(multiply(*written)) * factor(0)
        d_write = d_write + multiply((tc.transposed(d_out), attend))
        d_rest = multiply((d_write.astype(jnp.bfloat16), inverse))

        @member.one(0)
        def _() -> None:
            rounded = d_rest.astype(jnp.bfloat16)
            member.send(rounded, results.d_rest.at[b, pl.ds(n * CHUNK, CHUNK), part], flip=True)

        reading = (tc.load_transposed(d_out).astype(jnp.float32) * factor(1)).astype(jnp.bfloat16)
        predicting = (-d_rest * factor(2)).astype(jnp.bfloat16)
        keep = tc.by_row(tc.along_rows(rows.at[3]))
        before = [
            piece * keep + multiply((reading, query), (predicting, key))
            for piece, query, key in zip(state, queries, keys, strict=True)
        ]
        member.finished()

        @member.one(0)
        def _() -> None:
            @pl.when(turn + SLOTS < call.chunks)
            def _() -> None:
                _fetch(call, given, room, turn + SLOTS)

        return tuple(before)

    def piece(ref: Any, at: int) -> Any:
        return ref.at[b, h, columns, member.keys(at)]

    state = tuple(plgpu.load(piece(given.d_final, at), layout=tc.LAYOUT, optimized=False) for at in range(member.held))
    state = lax.fori_loop(0, call.chunks, chunk, state)
    for at, value in enumerate(state):
        piece(results.d_initial, at)[...] = value
    plgpu.wait_smem_to_gmem(0)


def run(call: Call, q: Any, k: Any, d_out: Any, attend: Any, inverse: Any, rows: Any, d_final: Any) -> Results:
    """All chunks of all heads."""
    return Results(
        *tc.launch(
            "delta_rule_state_gradients",
            functools.partial(_kernel, call=call),
            out_type=list(Results(call.values(jnp.bfloat16), call.states(), call.state())),
            scratch_types=list(
                Room(
                    q=tc.tiles(SLOTS, call.key_tiles),
                    k=tc.tiles(SLOTS, call.key_tiles),
                    d_out=tc.tiles(SLOTS),
                    pairs=tc.tiles(SLOTS, 2),
                    rows=plgpu.SMEM((SLOTS, ROWS, CHUNK), jnp.float32),
                    loaded=plgpu.Barrier(num_arrivals=2 * call.key_tiles + 4, num_barriers=SLOTS),
                    meeting=team.meeting(call),
                )
            ),
            grid={"tile": call.value_tiles, "h": call.heads, "b": call.batch},
            interpret=call.interpret,
            **team.threads(call),
        )(q, k, d_out, attend, inverse, rows, d_final)
    )
