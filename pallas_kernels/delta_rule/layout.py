"""How the arrays of a call lie in memory for the kernels: chunks of tokens by heads' lanes, gates as rows.

q, k, v stay token by token, [B, T, heads * width]: a head is a range of lanes, so nothing is transposed. Widths that do not
fill the 128 lanes are padded with zeros, which a chip's memory would do unasked. The state is [B, H, K, V].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.delta_rule.chunk import CHUNK, RUN, STRONGEST, Chunk, load

LANES = 128
Part = Any  # an array, its shape, its block of a grid step, or the reference that a kernel is given


class Call(NamedTuple):
    """The sizes and choices of one call, all static."""

    batch: int
    chunks: int  # a multiple of RUN
    heads: int
    key_heads: int
    key_dim: int  # K, padded to lanes
    value_dim: int  # V, padded to lanes
    scale: float
    normalise: bool
    out_dtype: Any
    interpret: Any  # False, True or pltpu.InterpretParams

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.steps

    @property
    def steps(self) -> int:
        return self.chunks // RUN

    @property
    def length(self) -> int:
        return self.chunks * CHUNK

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.key_dim, self.value_dim


class Operands(NamedTuple):
    """What the kernels read."""

    q: Part  # [B, T, h * K]
    k: Part  # [B, T, h * K]
    v: Part  # [B, T, H * V]
    gates: Part  # [B, H, n, 2, c] float32: beta, log decay
    initial: Part  # [B, H, K, V] float32
    documents: Part  # None or [B, n, 4, c] int32: see `document_rows`


def whole_lanes(width: int) -> int:
    return -(-width // LANES) * LANES


def to_lanes(x: jax.Array, tail: int) -> jax.Array:
    """[B, T, heads, X] as [B, T + tail, heads * X'], X' the next multiple of the lanes."""
    batch, length, heads, width = x.shape
    if tail or width % LANES:
        x = jnp.pad(x, [(0, 0), (0, tail), (0, 0), (0, whole_lanes(width) - width)])
    return x.reshape(batch, length + tail, heads * whole_lanes(width))


def from_lanes(x: jax.Array, length: int, heads: int, width: int) -> jax.Array:
    """`to_lanes` undone."""
    return x.reshape(*x.shape[:2], heads, -1)[:, :length, :, :width]


def finite_gates(beta: jax.Array, log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gates in float32, where either is NaN or infinite a beta of 0 and a log decay of NaN."""
    beta, log_decay = beta.astype(jnp.float32), log_decay.astype(jnp.float32)
    finite = jnp.isfinite(beta) & jnp.isfinite(log_decay)
    return jnp.where(finite, beta, 0.0), jnp.where(finite, log_decay, jnp.nan)


def gate_rows(beta: jax.Array, log_decay: jax.Array, tail: int, chunk: int = CHUNK) -> jax.Array:
    """[B, H, n, 2, c] from two of [B, T, H]; tokens of the tail write nothing and decay nothing. From `finite_gates`: a log
    decay that is NaN marks a token."""
    batch, length, heads = beta.shape
    both = jnp.stack([beta, jnp.maximum(log_decay, STRONGEST)])
    both = jnp.pad(both, [(0, 0), (0, 0), (0, tail), (0, 0)])
    both = both.reshape(2, batch, (length + tail) // chunk, chunk, heads)
    return both.transpose(1, 4, 2, 0, 3)


def from_rows(x: jax.Array, length: int) -> jax.Array:
    """[B, H, n, 1, c] as [B, T, H]."""
    return x.reshape(*x.shape[:2], -1)[:, :, :length].transpose(0, 2, 1)


def document_rows(documents: jax.Array, initial: jax.Array, tail: int, chunk: int = CHUNK) -> jax.Array:
    """[B, n, 4, c]: the document of each token, of the last real token up to it, of the state that the chunk finds, and
    of the one that it leaves. `initial` [B] is the document of the state that the first chunk finds."""
    documents = jnp.pad(documents.astype(jnp.int32), [(0, 0), (0, tail)])
    start = initial.astype(jnp.int32)[:, None]
    before = lax.cummax(jnp.concatenate([start, documents], axis=1), axis=1)
    chunks = (documents.shape[0], -1, chunk)
    here, latest = documents.reshape(chunks), before[:, 1:].reshape(chunks)
    edges = (jnp.broadcast_to(before[:, at::chunk, None][:, : here.shape[1]], here.shape) for at in (0, chunk))
    return jnp.stack([here, latest, *edges], axis=2)


def specs(call: Call, with_documents: bool, reverse: bool) -> Operands:
    """The blocks of `Operands` along a grid (B, H, n / RUN); the last axis runs from the end if `reverse`."""
    group = call.heads // call.key_heads

    def at(n: Any) -> Any:
        return call.steps - 1 - n if reverse else n

    keys = pl.BlockSpec((None, RUN * CHUNK, call.key_dim), lambda b, h, n: (b, at(n), lax.div(h, group)))
    return Operands(
        q=keys,
        k=keys,
        v=tokens_spec(call, call.value_dim, reverse),
        gates=rows_spec(call, 2, reverse),
        initial=state_spec(call),
        documents=pl.BlockSpec((None, RUN, 4, CHUNK), lambda b, h, n: (b, at(n), 0, 0)) if with_documents else None,
    )


def tokens_spec(call: Call, width: int, reverse: bool) -> Any:
    """One run of chunks and one value head of [B, T, H * width]."""
    return pl.BlockSpec((None, RUN * CHUNK, width), lambda b, h, n: (b, call.steps - 1 - n if reverse else n, h))


def rows_spec(call: Call, rows: int, reverse: bool) -> Any:
    """One run of chunks and one value head of [B, H, n, rows, c]."""
    block = (None, None, RUN, rows, CHUNK)
    return pl.BlockSpec(block, lambda b, h, n: (b, h, call.steps - 1 - n if reverse else n, 0, 0))


def state_spec(call: Call) -> Any:
    """One head's state, the same along the chunks."""
    return pl.BlockSpec((None, None, call.key_dim, call.value_dim), lambda b, h, n: (b, h, 0, 0))


def states_spec(call: Call, reverse: bool) -> Any:
    """One head's state before one run of chunks, of [B, H, n / RUN, K, V]."""
    block = (None, None, None, call.key_dim, call.value_dim)
    return pl.BlockSpec(block, lambda b, h, n: (b, h, call.steps - 1 - n if reverse else n, 0, 0))


def rows_of(index: int) -> slice:
    """The tokens of one chunk in a block of tokens."""
    return slice(index * CHUNK, (index + 1) * CHUNK)


def documents_of(given: Operands, index: int) -> Any:
    """The rows of one chunk, or None."""
    return None if given.documents is None else given.documents[index]


def load_run(given: Operands, call: Call) -> list[Chunk]:
    """The matrices of each chunk of a grid step."""

    def one(index: int) -> Chunk:
        q, k, v = (ref[rows_of(index), :] for ref in (given.q, given.k, given.v))
        return load(q, k, v, given.gates[index], documents_of(given, index), call.scale, call.normalise)

    return [one(index) for index in range(RUN)]
