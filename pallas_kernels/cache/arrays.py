"""What goes into the cache kernels and comes out, and where a grid step finds its part of it.

The grid is (B, H, blocks), and tokens lie heads first, [B, H, T, X]: XLA makes such an array in place of [B, T, H, X] as it
comes out of a projection, while [B, T, H * X], which would need no turning, costs it a copy for each norm over a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


class Cache(NamedTuple):
    """W rows for each value head, best score first and earlier first among equals."""

    keys: Any  # [B, H, W, K], as they are stored
    values: Any  # [B, H, W, V]
    scores: Any  # [B, H, W], float32; -inf where a row is empty
    positions: Any  # [B, H, W], int32; -1 where a row is empty
    document: Any  # [B], int32: to which all rows of a batch row belong; 0 for none


class Shape(NamedTuple):
    """The sizes of one call. `group` value heads share a key head."""

    batch: int
    heads: int
    group: int
    blocks: int
    block: int
    window: int
    key_dim: int
    value_dim: int

    def tokens(self, width: int) -> tuple[int, ...]:
        """The shape of an array that has `width` numbers for each token and value head."""
        return self.batch, self.heads, self.blocks * self.block, width


class Tokens(NamedTuple):
    """A block of tokens, as a kernel sees it."""

    queries: Any  # [C, K]
    keys: Any  # [C, K]
    values: Any  # [C, V]
    scores: Any  # [1, C]
    documents: Any  # [1, C], or None where all tokens are of one document


class Rows(NamedTuple):
    """Rows of the cache, as a kernel sees them."""

    keys: Any  # [W, K]
    values: Any  # [W, V]
    scores: Any  # [1, W]
    positions: Any  # [1, W]


def cost(shape: Shape, *, reads: int, picks: int, arrays: Any) -> pl.CostEstimate:
    """What a kernel tells the compiler. `reads`: FLOPs for each query, channel and entry that the query's tile may see;
    `picks`: for each row of the cache, channel and candidate. `arrays`: operands and results, each moved once."""
    width, candidates = shape.key_dim + shape.value_dim, shape.window + shape.block
    tile = min(shape.block, 128)  # of queries, see `tiles.query_tiles`
    seen = shape.window + (shape.block + tile) // 2
    steps = shape.batch * shape.heads * shape.blocks
    return pl.CostEstimate(
        flops=steps * width * (reads * shape.block * seen + picks * shape.window * candidates),
        transcendentals=steps * shape.block * seen,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays)),
    )


class Places:
    """Block specifications. `order` turns a grid step into the block it works on."""

    def __init__(self, shape: Shape, order: Callable[[Any], Any] = lambda step: step) -> None:
        self.shape, self.order = shape, order

    def tokens(self, width: int, group: int = 1) -> pl.BlockSpec:
        """[C, width] of a head; of the key head that a value head shares with `group` - 1 others."""
        block, order = self.shape.block, self.order

        def head(h: Any) -> Any:  # `//` would ask for signs, which Mosaic lowers only where it knows the chip
            return lax.div(h, jnp.int32(group))

        return pl.BlockSpec((None, None, block, width), lambda b, h, i, *_: (b, head(h), order(i), 0))

    def token_row(self) -> pl.BlockSpec:
        """One number for each token and head, [B, H, 1, T]."""
        order = self.order
        return pl.BlockSpec((None, None, 1, self.shape.block), lambda b, h, i, *_: (b, h, 0, order(i)))

    def documents(self) -> pl.BlockSpec:
        order = self.order
        return pl.BlockSpec((None, 1, self.shape.block), lambda b, h, i, *_: (b, 0, order(i)))

    def of_head(self, *size: int) -> pl.BlockSpec:
        """What a head has once, [B, H, *size]."""
        return pl.BlockSpec((None, None, *size), lambda b, h, i, *_: (b, h, 0, 0))

    def of_block(self, *size: int) -> pl.BlockSpec:
        """What a block has once, [B, H, n, *size]."""
        order = self.order
        return pl.BlockSpec((None, None, None, *size), lambda b, h, i, *_: (b, h, order(i), 0, 0))
