"""What goes into the fused kernels and comes out, and where a grid step finds its part of it.

The grid is (B, H, blocks). q, k, v and the outputs stay token by token, [B, T, heads * width], as projections make them: a
head is a range of lanes, so nothing is turned. A block of C tokens is C / c chunks of the delta rule. Letters are those of
`delta_rule.chunk` and of the cache: C tokens of a block, W rows of the cache, m = C / c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cache.arrays import Rows, Tokens
from pallas_kernels.delta_rule.chunk import EPSILON, Chunk, finite_rows, load

Part = Any  # an array, its shape, its block of a grid step, or the reference that a kernel is given


class Call(NamedTuple):
    """The sizes and choices of one call, all static."""

    batch: int
    heads: int
    key_heads: int
    blocks: int
    block: int  # C
    chunk: int  # c, divides C
    window: int  # W
    key_dim: int  # K, padded to lanes
    value_dim: int  # V, padded to lanes
    scale: float  # of the state's output
    share: float  # what of a vector's squared length its read norm divides by: 1 / K for the root mean square
    residual: bool  # whether scores are |e|, not beta |e|
    dtype: Any  # of tokens, cache and outputs
    energy: float | None  # the share of its weights that a read keeps; None keeps all
    interpret: Any

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def chunks(self) -> int:
        """Of a block."""
        return self.block // self.chunk

    @property
    def length(self) -> int:
        return self.blocks * self.block

    @property
    def per_head(self) -> tuple[int, int]:
        return self.batch, self.heads

    @property
    def run(self) -> int:
        """Chunks that are made at once: their inverses wait for each other's products, not for a state."""
        return 2 if self.chunks % 2 == 0 else 1

    @property
    def chunk_slices(self) -> list[slice]:
        """The tokens of each chunk in a block."""
        return [slice(index * self.chunk, (index + 1) * self.chunk) for index in range(self.chunks)]

    def rows_of(self, chunk: Any) -> Any:
        """The tokens of one chunk in a block."""
        return pl.ds(pl.multiple_of(chunk * self.chunk, self.chunk), self.chunk)


class Counts(NamedTuple):
    """Scalars of each row of the batch, int32."""

    start: Part  # [B]: position of place 0
    whole: Part  # [B]: how many blocks are complete
    fill: Part  # [B]: how many places an earlier piece occupies
    documents: Part  # [B, n + 1]: of the cache before each block, and after the last


class Running(NamedTuple):
    """The running block that an earlier piece left, in the first `fill` places."""

    keys: Part  # [B, h, C, K], as stored
    values: Part  # [B, H, C, V]
    scores: Part  # [B, H, 1, C]


class Operands(NamedTuple):
    """What the kernels read."""

    q: Part  # [B, T, h * K]
    k: Part  # [B, T, h * K]
    v: Part  # [B, T, H * V]
    gates: Part  # [B, H, T / c, 2, c] float32: beta, log decay (NaN where either is not finite)
    query_scale: Part  # [H, 1, K] float32, the softmax's temperature multiplied in
    key_scale: Part  # [h, 1, K] float32
    sink: Part  # [H] float32
    gate: Part  # [H] float32
    initial: Part  # [B, H, K, V] float32
    cache: Rows | None  # [B, H, ...]; the backward kernel has what was kept
    running: Running | None
    scores: Part  # [B, H, 1, T] float32, or None where the write's magnitude is the score
    own: Part  # [B, T / c, 4, c] int32, see `delta_rule.layout.document_rows`, or None where there is one document
    visible: Part  # [B, 1, T] int32: the document of each token, the running block's too, or None


class Prepared(NamedTuple):
    """A block's tokens as the read sees them, on the chip; zeros for those that are not finite."""

    queries: Any  # [C, K]
    keys: Any  # [C, K]
    values: Any  # [C, V]
    scores: Any  # [1, C]


def load_chunk(given: Operands, call: Call, index: Any, inverse: Array | None = None) -> Chunk:
    """The delta rule's matrices of one chunk."""
    rows = call.rows_of(index)
    tokens = given.q[rows, :], given.k[rows, :], given.v[rows, :]
    return load(*tokens, given.gates[index], documents_of(given, index), call.scale, True, inverse)


def documents_of(given: Operands, index: Any) -> Any:
    """The rows of one chunk, or None."""
    return None if given.own is None else given.own[index]


def for_runs(call: Call, body: Callable[[list[Any]], None]) -> None:
    """Calls `body` with the chunks of each run of a block: a loop on the chip, so that one run's matrices live at a time."""

    def step(run: Any, nothing: None) -> None:
        body([run * call.run + index for index in range(call.run)])

    lax.fori_loop(0, call.chunks // call.run, step, None)


def read_factor(x: Array, share: float) -> Array:
    """What the read's norm multiplies each row by, before the learned scale."""
    return lax.rsqrt(share * jnp.sum(x * x, axis=1, keepdims=True) + EPSILON)


def finite(x: Array) -> Array:
    """Rows in float32, zero where they are not finite."""
    x = x.astype(jnp.float32)
    return jnp.where(finite_rows(x), x, 0.0)


def occupied(call: Call, fill: Array, axis: int = 0) -> Array:
    """Which places of a first block an earlier piece occupies, as a column or, along axis 1, as a row."""
    shape = (call.block, 1) if axis == 0 else (1, call.block)
    return lax.broadcasted_iota(jnp.int32, shape, axis) < fill


def prepare(given: Operands, prepared: Prepared, call: Call, first: Any, fill: Array) -> Tokens:
    """Normalises queries and keys for the read, and puts the running block in front in a head's `first` block."""
    for raw, scale, ready in (
        (given.q, given.query_scale, prepared.queries),
        (given.k, given.key_scale, prepared.keys),
    ):
        x = finite(raw[...])
        ready[...] = (x * read_factor(x, call.share) * scale[...]).astype(ready.dtype)
    prepared.values[...] = finite(given.v[...]).astype(prepared.values.dtype)
    running = given.running
    if running is not None:

        @pl.when(first)
        def _() -> None:
            held = occupied(call, fill)
            for old, new in ((running.keys, prepared.keys), (running.values, prepared.values)):
                new[...] = jnp.where(held, old[...], new[...])

    return Tokens(prepared.queries, prepared.keys, prepared.values, prepared.scores, given.visible)


class Places:
    """Block specifications. `order` turns a grid step into the block it works on."""

    def __init__(self, call: Call, order: Callable[[Any], Any] = lambda step: step) -> None:
        self.call, self.order = call, order

    def _key_head(self, h: Any) -> Any:
        return lax.div(h, jnp.int32(self.call.group))  # `//` asks for signs, which Mosaic lowers for known chips alone

    def tokens(self, width: int, by_key_head: bool = False) -> pl.BlockSpec:
        """[C, width] of a head, or of the key head that it shares."""
        head = self._key_head if by_key_head else lambda h: h
        return pl.BlockSpec((None, self.call.block, width), lambda b, h, i, *_: (b, self.order(i), head(h)))

    def token_row(self) -> pl.BlockSpec:
        """Of [B, H, 1, T]."""
        return pl.BlockSpec((None, None, 1, self.call.block), lambda b, h, i, *_: (b, h, 0, self.order(i)))

    def chunk_rows(self, rows: int) -> pl.BlockSpec:
        """Of [B, H, T / c, rows, c]."""
        size = None, None, self.call.chunks, rows, self.call.chunk
        return pl.BlockSpec(size, lambda b, h, i, *_: (b, h, self.order(i), 0, 0))

    def own(self) -> pl.BlockSpec:
        size = None, self.call.chunks, 4, self.call.chunk
        return pl.BlockSpec(size, lambda b, h, i, *_: (b, self.order(i), 0, 0))

    def visible(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, self.call.block), lambda b, h, i, *_: (b, 0, self.order(i)))

    def scale(self, by_key_head: bool) -> pl.BlockSpec:
        head = self._key_head if by_key_head else lambda h: h
        return pl.BlockSpec((None, 1, self.call.key_dim), lambda b, h, i, *_: (head(h), 0, 0))

    def of_head(self, *size: int, by_key_head: bool = False) -> pl.BlockSpec:
        """What a head has once, [B, H, *size]."""
        head = self._key_head if by_key_head else lambda h: h
        return pl.BlockSpec((None, None, *size), lambda b, h, i, *_: (b, head(h), 0, 0))

    def of_block(self, *size: int) -> pl.BlockSpec:
        """What a block has once, [B, H, n, *size]."""
        return pl.BlockSpec((None, None, None, *size), lambda b, h, i, *_: (b, h, self.order(i), 0, 0))

    def rows(self) -> Rows:
        """The cache of a head."""
        return Rows(*(self.of_head(*size) for size in row_sizes(self.call)))

    def operands(self, given: Operands) -> Operands:
        call = self.call
        on_chip = pl.BlockSpec(memory_space=pltpu.SMEM)
        specs = Operands(
            q=self.tokens(call.key_dim, by_key_head=True),
            k=self.tokens(call.key_dim, by_key_head=True),
            v=self.tokens(call.value_dim),
            gates=self.chunk_rows(2),
            query_scale=self.scale(by_key_head=False),
            key_scale=self.scale(by_key_head=True),
            sink=on_chip,
            gate=on_chip,
            initial=self.of_head(call.key_dim, call.value_dim),
            cache=self.rows(),
            running=Running(
                self.of_head(call.block, call.key_dim, by_key_head=True),
                self.of_head(call.block, call.value_dim),
                self.of_head(1, call.block),
            ),
            scores=self.token_row(),
            own=self.own(),
            visible=self.visible(),
        )
        return specs._replace(**{name: None for name, x in given._asdict().items() if x is None})


def row_sizes(call: Call) -> Rows:
    return Rows((call.window, call.key_dim), (call.window, call.value_dim), (1, call.window), (1, call.window))


def row_types(call: Call) -> Rows:
    return Rows(call.dtype, call.dtype, jnp.float32, jnp.int32)


def cost(call: Call, products: int, reads: int, picks: int, arrays: Any) -> pl.CostEstimate:
    """What a kernel tells the compiler. For each chunk `products` of [c, K] by [K, V]; `reads` FLOPs for each query, channel
    and entry that the query's tile may see; `picks` for each row of the cache, channel and candidate. `arrays`: operands
    and results, each moved once."""
    width, steps = call.key_dim + call.value_dim, call.batch * call.heads * call.blocks
    state = 2 * call.block * (products * call.key_dim * call.value_dim + 14 * call.chunk * call.chunk)
    seen = call.window + (call.block + min(call.block, 128)) // 2
    cache = width * (reads * call.block * seen + picks * call.window * (call.window + call.block))
    return pl.CostEstimate(
        flops=steps * (state + cache),
        transcendentals=steps * call.block * (seen + call.chunk),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays)),
    )
