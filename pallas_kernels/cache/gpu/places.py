"""What the kernels read, where a thread block finds its part of it, and how entries of the visible set come to it.

The tokens of a block meet the same W rows of the cache and, causally, each other: there is nothing to carry from block to
block, so all blocks run at once. Rows of the cache come from a copy that XLA gathers. Hopper's copy engine takes tiles of
neighbouring rows and no list of them, and the copy costs 2 W (K + V) numbers a block beside the 2 C (K + V) of its
tokens' queries, keys, values and read: an eighth more at W = C / 4 when it is written, and it is read from the L2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.cache.gpu.tiles import ROWS, loop, matrix, turn


class Sizes(NamedTuple):
    """Of one call. `group` value heads share a key head; `window` is a multiple of ROWS."""

    batch: int
    heads: int
    group: int
    blocks: int
    block: int
    window: int
    key_dim: int
    value_dim: int

    @property
    def tokens(self) -> int:
        return self.blocks * self.block

    @property
    def rows(self) -> int:
        """Of all caches."""
        return self.batch * self.heads * self.blocks * self.window

    @property
    def readers(self) -> int:
        """Warpgroups that multiply in a thread block, each for ROWS queries."""
        return 2 if self.block % (2 * ROWS) == 0 else 1


class Operands(NamedTuple):
    """Who asks and what there is to see. A query sees an entry of its document that does not come later: `asking` has
    the documents of queries, `owners` those of entries, -1 for padding and empty rows."""

    queries: Any  # [B, T, H, K]
    keys: Any  # [B, T, h, K]
    values: Any  # [B, T, H, V]
    cached_keys: Any  # [B H n W, K]: of the cache that each block finds
    cached_values: Any  # [B H n W, V]
    asking: Any  # [B T], int32
    owners: Any  # [B T], int32
    cached_owners: Any  # [B H n W], int32


class Place(NamedTuple):
    """Where a thread block stands: in a block of a head, at its `part`."""

    sizes: Sizes
    batch: Any
    head: Any
    block: Any
    part: Any

    @classmethod
    def of_queries(cls, sizes: Sizes) -> Place:
        return cls._split(sizes, sizes.block // (ROWS * sizes.readers))

    @classmethod
    def of_entries(cls, sizes: Sizes) -> Place:
        """Parts are the tiles of the cache, then those of the block."""
        return cls._split(sizes, (sizes.window + sizes.block) // ROWS)

    @classmethod
    def _split(cls, sizes: Sizes, parts: int) -> Place:
        tile, count = lax.axis_index("tile"), jnp.int32(parts)
        return cls(sizes, lax.axis_index("batch"), lax.axis_index("head"), lax.div(tile, count), lax.rem(tile, count))

    def token(self, within: Any) -> Any:
        """Place in the sequence of a token of the block."""
        return self.block * self.sizes.block + within

    def tokens(self, within: Any) -> Any:
        """A tile of a matrix [B, T, H, X]."""
        return self.batch, pl.ds(self.token(within), ROWS), self.head

    def shared(self, within: Any) -> Any:
        """A tile of [B, T, h, X], which a group of heads share."""
        return self.batch, pl.ds(self.token(within), ROWS), lax.div(self.head, jnp.int32(self.sizes.group))

    def of_all(self, within: Any) -> Any:
        """A piece of [B T]."""
        return pl.ds(self.batch * self.sizes.tokens + self.token(within), ROWS)

    def of_head(self, within: Any) -> Any:
        """A piece of [B H T]."""
        head = self.batch * self.sizes.heads + self.head
        return pl.ds(head * self.sizes.tokens + self.token(within), ROWS)

    def cached(self, within: Any) -> Any:
        """A tile of the rows of the block's cache."""
        found = (self.batch * self.sizes.heads + self.head) * self.sizes.blocks + self.block
        return pl.ds(found * self.sizes.window + within, ROWS)


class Ring(NamedTuple):
    """Buffers that are filled, read and filled again."""

    buffers: Any
    ready: Any
    consumed: Any


class Entries(NamedTuple):
    """Tiles of keys and values on their way to the warpgroups that multiply."""

    keys: Ring
    values: Ring
    owners: Any  # beside the keys

    @staticmethod
    def scratch(sizes: Sizes, stages: int) -> Entries:
        def ring(width: int, arrivals: int) -> Ring:
            ready = plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
            return Ring(
                matrix(stages, ROWS, width), ready, plgpu.Barrier(num_arrivals=sizes.readers, num_barriers=stages)
            )

        return Entries(ring(sizes.key_dim, 2), ring(sizes.value_dim, 1), plgpu.SMEM((stages, ROWS), jnp.int32))

    @property
    def stages(self) -> int:
        return int(self.owners.shape[0])

    def bring(self, operands: Operands, place: Place, steps: Any) -> None:
        """Everything that the queries of a thread block see: the cache first. The part of the warpgroup that copies."""
        in_cache = place.sizes.window // ROWS

        def fill(ring: Ring, slot: Any, step: Any, *pairs: tuple[Any, Any]) -> None:
            @pl.when(step >= self.stages)
            def _() -> None:
                plgpu.barrier_wait(ring.consumed.at[slot])

            for source, target in pairs:
                plgpu.copy_gmem_to_smem(source, target.at[slot], ring.ready.at[slot])

        def bring_tile(step: Any) -> None:
            slot, rows, tokens = turn(step, self.stages), place.cached(step * ROWS), (step - in_cache) * ROWS

            @pl.when(step < in_cache)
            def _() -> None:
                fill(self.values, slot, step, (operands.cached_values.at[rows], self.values.buffers))
                keys = operands.cached_keys.at[rows], self.keys.buffers
                fill(self.keys, slot, step, keys, (operands.cached_owners.at[rows], self.owners))

            @pl.when(step >= in_cache)
            def _() -> None:
                fill(self.values, slot, step, (operands.values.at[place.tokens(tokens)], self.values.buffers))
                keys = operands.keys.at[place.shared(tokens)], self.keys.buffers
                fill(self.keys, slot, step, keys, (operands.owners.at[place.of_all(tokens)], self.owners))

        loop(0, steps, bring_tile)

    def pass_by(self, step: Any) -> None:
        """Leaves a tile to the other warpgroup, which stands later in the block."""
        slot = turn(step, self.stages)
        for ring in (self.values, self.keys):
            plgpu.barrier_wait(ring.ready.at[slot])
            plgpu.barrier_arrive(ring.consumed.at[slot])


def launch(
    body: Callable[..., None], out_type: Any, scratch: Any, grid: tuple[int, int, int], threads: int, interpret: Any
) -> Any:
    """A kernel over (heads, tiles, batch). Neighbouring thread blocks have the same tokens' documents at hand."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("head", "tile", "batch"),
        num_threads=threads,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
