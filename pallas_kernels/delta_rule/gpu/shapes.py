"""The sizes of a call and what its kernels are given: tokens as they are, gates as rows of 64."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.delta_rule.chunk import CHUNK, GRID, STRONGEST
from pallas_kernels.delta_rule.gpu.tensor_core import TILE


class Call(NamedTuple):
    """The sizes and choices of one call, all static."""

    batch: int
    chunks: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    scale: float
    normalise: bool
    out_dtype: Any
    interpret: Any  # None or plgpu.InterpretGPUParams

    @property
    def length(self) -> int:
        return self.chunks * CHUNK

    @property
    def key_tiles(self) -> int:
        return self.key_dim // TILE

    @property
    def value_tiles(self) -> int:
        return self.value_dim // TILE

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def simulated(self) -> bool:
        return self.interpret is not None

    def rows(self, *count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.chunks, *count, CHUNK), jnp.float32)

    def pairs(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.chunks, CHUNK, CHUNK), jnp.bfloat16)

    def values(self, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.length, self.heads * self.value_dim), dtype)

    def state(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.value_dim, self.key_dim), jnp.float32)

    def states(self) -> jax.ShapeDtypeStruct:
        shape = (self.batch, self.heads, self.chunks, self.value_dim, self.key_dim)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


class Gates(NamedTuple):
    """[B, H, n, c] float32 each, keep [B, H, n], document [B, n, c]."""

    beta: jax.Array
    coarse: jax.Array  # the running sum of the log decays' multiples of a grid, exact
    fine: jax.Array  # ... and of what is left of them: differences of large sums keep their digits
    entering: jax.Array  # what is left of the incoming state at a token
    leaving: jax.Array  # what is left of a token's write in the outgoing state
    keep: jax.Array  # what is left of the incoming state in the outgoing one
    document: jax.Array  # the number of the token's document in its chunk, a number of its own at padding


def to_chunks(x: jax.Array, tail: int) -> jax.Array:
    """[B, T, H] as [B, H, n, c], zeros behind."""
    x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, tail), (0, 0)])
    return x.transpose(0, 2, 1).reshape(x.shape[0], x.shape[2], -1, CHUNK)


def from_chunks(x: jax.Array, length: int) -> jax.Array:
    return x.reshape(*x.shape[:2], -1)[:, :, :length].transpose(0, 2, 1)


def gates(beta: jax.Array, log_decay: jax.Array, documents: jax.Array | None, initial: jax.Array, tail: int) -> Gates:
    """`documents` [B, T], 0 at padding, of which the state that the first token finds belongs to `initial` [B].

    Sums start anew with each document, so that no bit of one depends on another; whatever is exponentiated is at most 0.
    """
    beta, decay = to_chunks(beta, tail), jnp.maximum(to_chunks(log_decay, tail), STRONGEST)
    batch, chunks = beta.shape[0], beta.shape[2]
    causal = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    if documents is None:
        run, real = causal, jnp.ones((1, 1, 1, 1), bool)
        enters = leaves = jnp.ones((1, 1, 1, 1), bool)
        kept = jnp.ones((1, 1, 1), bool)
        number = jnp.broadcast_to(jnp.zeros((), jnp.float32), (batch, chunks, CHUNK))
    else:
        documents = jnp.pad(documents.astype(jnp.int32), [(0, 0), (0, tail)])
        before = lax.cummax(jnp.concatenate([initial.astype(jnp.int32)[:, None], documents], axis=1), axis=1)
        here, latest = (x.reshape(batch, chunks, CHUNK) for x in (documents, before[:, 1:]))
        start, end = before[:, :-1:CHUNK, None], latest[:, :, -1:]
        run = (causal & (latest[..., :, None] == latest[..., None, :]))[:, None]
        real = (here > 0)[:, None]
        enters, leaves = real & (here == start)[:, None], real & (here == end)[:, None]
        kept = (start == end)[:, None, :, 0]
        new = jnp.concatenate([jnp.zeros_like(start, bool), latest[..., 1:] != latest[..., :-1]], axis=2)
        place = jnp.arange(CHUNK)
        number = jnp.where(here > 0, jnp.cumsum(new, axis=2), -1 - place).astype(jnp.float32)
    rounded = lax.stop_gradient(GRID * jnp.round(decay / GRID))

    def running(part: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(run, part[..., None, :], 0.0), axis=-1)

    coarse, fine = running(rounded), running(decay - rounded)
    remaining = (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)
    remaining = remaining - lax.stop_gradient(jnp.maximum(remaining, 0.0))
    total = coarse + fine
    return Gates(
        beta=jnp.where(real, beta, 0.0),
        coarse=coarse,
        fine=fine,
        entering=jnp.where(enters, jnp.exp(total), 0.0),
        leaving=jnp.where(leaves, jnp.exp(remaining), 0.0),
        keep=jnp.where(kept, jnp.exp(total[..., -1]), 0.0),
        document=number,
    )
