"""The warpgroups that walk along the chunks together: each holds S' for its part of the key dimension.

S of 64 value columns and 256 keys is 128 registers of each thread in one warpgroup, and with what a product needs beside
it spills; two warpgroups hold 64 each. What each makes of its keys, `shared` adds up; the rest both do, alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.delta_rule.gpu import tensor_core as tc
from pallas_kernels.delta_rule.gpu.shapes import Call

TILES = 2  # of S' to a warpgroup
SLOTS = 2  # chunks in shared memory: one is worked on while the next arrives


def size(call: Call) -> int:
    """How many warpgroups."""
    return max(1, call.key_tiles // TILES)


class Meeting(NamedTuple):
    """What warpgroups share beside the inputs; one that is alone needs no barrier and no sums."""

    stages: Any
    rooms: Any  # for products that are simulated, or None
    sums: Any
    told: Any
    done: Any


def meeting(call: Call) -> Meeting:
    team = size(call)
    return Meeting(
        stages=tc.tiles(team),
        rooms=tc.tiles(team) if call.simulated else None,
        sums=tc.sums(team) if team > 1 else None,
        told=plgpu.Barrier(num_arrivals=team) if team > 1 else None,
        done=plgpu.Barrier(num_arrivals=team) if team > 1 else None,
    )


class Member(NamedTuple):
    """One warpgroup, as it finds itself in a kernel."""

    call: Call
    meeting: Meeting

    @property
    def index(self) -> Any:
        return lax.axis_index("member") if size(self.call) > 1 else jnp.int32(0)

    @property
    def room(self) -> Any:
        return None if self.meeting.rooms is None else self.meeting.rooms.at[self.index]

    @property
    def held(self) -> int:
        """How many tiles of S' it holds."""
        return self.call.key_tiles // size(self.call)

    @property
    def first(self) -> Any:
        """The first of them."""
        return self.index * self.held

    def keys(self, at: int) -> Any:
        """The key columns of one of its tiles."""
        return pl.ds((self.first + at) * tc.TILE, tc.TILE)

    def one(self, index: int) -> Any:
        """A decorator for what one of them does alone."""
        return pl.when(self.index == index)

    def shared(self, part: jax.Array) -> jax.Array:
        """The sum over the team, the same bits for each."""
        if size(self.call) == 1:
            return part
        self.meeting.sums[self.index] = part
        plgpu.barrier_arrive(self.meeting.told)
        plgpu.barrier_wait(self.meeting.told)
        return part + self.meeting.sums[1 - self.index]

    def finished(self) -> None:
        """Waits for the team."""
        if size(self.call) > 1:
            plgpu.barrier_arrive(self.meeting.done)
            plgpu.barrier_wait(self.meeting.done)

    def send(self, tile: jax.Array, ref: Any, flip: bool = False) -> None:
        """Stores a tile by way of shared memory, from which the last one has gone."""
        stage = self.meeting.stages.at[self.index]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if flip:
            tc.transposed(stage)[...] = tc.flipped(tile)
        else:
            stage[...] = tile
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stage, ref)


def threads(call: Call) -> dict[str, Any]:
    """What a kernel is told of its team."""
    return {"num_threads": size(call), "thread_name": "member"} if size(call) > 1 else {}
