"""What both kernels make of one chunk of tokens: decays, pair products and the chunk's inverse.

NaN and inf reach the outputs of their own document from their token on, and nothing else. Tokens of a chunk share matrix
products, where 0 * NaN would spread through every mask: so the arithmetic sees zeros in their place, `spoilt` tells what
they would have reached, and that is overwritten. A spoilt state is one that holds NaN.

Letters: c tokens of a chunk, K and V the key and value width. Numbers that belong to tokens come as rows [1, c], which
memory holds without waste, and are turned to columns [c, 1] by a masked sum, exactly and without a transposition. Running
sums are masked sums as well: Mosaic has no cumsum. All is float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 64
RUN = 2  # chunks of a grid step: their inverses wait for each other's matrix products, not for a state
STRONGEST = -104.0  # exp of it is 0 in float32, so stronger decays are as strong
GRID = 2.0**-9  # sums of CHUNK multiples of it down to STRONGEST are exact in float32
SPOILT = 2.0  # the mark of what NaN or inf has reached
EPSILON = 1e-6  # beside the squared norm of a key or query


class Decays(NamedTuple):
    """Decays of a chunk, 0 between tokens and states of different documents."""

    run: jax.Array  # [c, c] true where i and j count to one document, padding to the one before it
    pairs: jax.Array  # [c, c] exp(G_i - G_j) for j <= i
    strict: jax.Array  # [c, c] likewise for j < i
    entering: jax.Array  # [c, 1] what is left of the incoming state at a token
    leaving: jax.Array  # [c, 1] what is left of a token's write in the outgoing state
    keep: jax.Array  # [1, 1] what is left of the incoming state in the outgoing one


class Finite(NamedTuple):
    """Which tokens of a chunk hold no NaN and no inf."""

    q: jax.Array  # [c, 1]
    k: jax.Array  # [c, 1]
    v: jax.Array  # [c, 1]
    gates: jax.Array  # [1, c]


class Chunk(NamedTuple):
    """One chunk's inputs and the matrices that do not depend on the state."""

    q: jax.Array  # [c, K]
    k: jax.Array  # [c, K]
    v: jax.Array  # [c, V]
    beta: jax.Array  # [c, 1]
    decay: Decays
    attend: jax.Array  # [c, c] scale q_i' k_j with decays, j <= i
    lower: jax.Array  # [c, c] beta_i k_i' k_j with decays, j < i
    inverse: jax.Array  # [c, c] (I + lower)^-1
    reader: jax.Array  # [c, K] scale exp(G) q: reads the incoming state
    predictor: jax.Array  # [c, K] beta exp(G) k: what the incoming state says of the values
    leaver: jax.Array  # [c, K] exp(G_c - G) k: writes the outgoing state
    finite: Finite


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """The float32 product of two matrices over one axis of each."""
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def places(size: int) -> tuple[jax.Array, jax.Array]:
    """The row and the column of each entry of a [c, c] matrix."""
    return tuple(lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))  # type: ignore[return-value]


def to_column(row: jax.Array) -> jax.Array:
    """[1, c] as [c, 1], bit by bit."""
    i, j = places(row.shape[1])
    return jnp.sum(jnp.where(i == j, row, jnp.zeros_like(row)), axis=1, keepdims=True)


def to_row(column: jax.Array) -> jax.Array:
    """[c, 1] as [1, c], bit by bit."""
    i, j = places(column.shape[0])
    return jnp.sum(jnp.where(i == j, column, jnp.zeros_like(column)), axis=0, keepdims=True)


def finite_rows(x: jax.Array) -> jax.Array:
    """[c, 1]: whether all of a row is finite. 0 * x is NaN just where x is not, and a sum keeps it."""
    return jnp.sum(0.0 * x, axis=1, keepdims=True) == 0.0


def without_spoilt(state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A state with zeros for what is not finite, and its mark for `spoilt`, [1, 1]."""
    finite = 0.0 * state == 0.0
    mark = jnp.max(jnp.where(finite, 0.0, SPOILT), axis=1, keepdims=True)
    return jnp.where(finite, state, 0.0), jnp.max(mark, axis=0, keepdims=True)


def decays(log_decay: jax.Array, documents: jax.Array | None) -> Decays:
    """The decays from a row of log decays [1, c] and the four rows of `layout.document_rows`.

    |G| grows to thousands under strong gates and a difference of two such sums has few digits left: what is a multiple of
    a grid is summed exactly, the small rest apart from it. Sums start anew with each document, so that no bit of one
    depends on another. Whatever is exponentiated is at most 0, or masked before.
    """
    i, j = places(log_decay.shape[1])
    causal = run = j <= i
    if documents is not None:
        here, latest = documents[0:1], documents[1:2]
        own = to_column(here)
        causal = causal & (own == here) & (own > 0)
        run = run & (to_column(latest) == latest)
    coarse = GRID * jnp.round(log_decay / GRID)
    parts = (coarse, log_decay - coarse)
    columns = [jnp.sum(jnp.where(run, part, 0.0), axis=1, keepdims=True) for part in parts]
    rows = [to_row(column) for column in columns]
    last = [column[column.shape[0] - 1 :, :] for column in columns]
    difference = (columns[0] - rows[0]) + (columns[1] - rows[1])
    pairs = jnp.exp(jnp.where(causal, difference, -jnp.inf))
    remaining = (last[0] - columns[0]) + (last[1] - columns[1])
    entering, leaving, keep = columns[0] + columns[1], jnp.minimum(remaining, 0.0), last[0] + last[1]
    entering, leaving, keep = jnp.exp(entering), jnp.exp(leaving), jnp.exp(keep)
    if documents is not None:
        start, end = to_column(documents[2:3]), to_column(documents[3:4])
        entering = jnp.where((own == start) & (own > 0), entering, 0.0)
        leaving = jnp.where((own == end) & (own > 0), leaving, 0.0)
        keep = jnp.where(start[:1] == end[:1], keep, 0.0)
    return Decays(run, pairs, jnp.where(j < i, pairs, 0.0), entering, leaving, keep)


def unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """(I + lower)^-1 for a strictly lower triangular [c, c] matrix, by doubling the blocks that are inverted.

    X - X L_off X joins pairs of inverted blocks; powers of L, which overflow when |L| > 1, are never formed.
    """
    i, j = places(lower.shape[0])
    inverse = jnp.where(i == j, 1.0, 0.0) - jnp.where(i >> 1 == j >> 1, lower, 0.0)
    for bits in range(1, (lower.shape[0] - 1).bit_length()):  # blocks of 2**bits are inverted
        joins = (i >> bits != j >> bits) & (i >> (bits + 1) == j >> (bits + 1))
        below = jnp.where(joins, lower, 0.0)
        inverse = inverse - product(product(inverse, below), inverse)
    return inverse


def norm_factor(x: jax.Array) -> jax.Array:
    """1 / sqrt(|x|^2 + 1e-6) of each row."""
    return lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) + EPSILON)


def load(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    documents: jax.Array | None,
    scale: float,
    normalise: bool,
    inverse: jax.Array | None = None,
) -> Chunk:
    """The matrices of one chunk; `gates` as `layout.gate_rows` makes them. An `inverse` that is known is not made again."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    finite = Finite(finite_rows(q), finite_rows(k), finite_rows(v), 0.0 * gates[1:2] == 0.0)
    q, k, v = (jnp.where(fine, x, 0.0) for fine, x in zip(finite[:3], (q, k, v), strict=True))
    if normalise:
        q, k = q * norm_factor(q), k * norm_factor(k)
    beta, decay = to_column(gates[0:1]), decays(jnp.where(finite.gates, gates[1:2], 0.0), documents)
    attend = product(q, k, (1, 1)) * (decay.pairs * scale)
    lower = product(k, k, (1, 1)) * decay.strict * beta
    return Chunk(
        q=q,
        k=k,
        v=v,
        beta=beta,
        decay=decay,
        attend=attend,
        lower=lower,
        inverse=unit_lower_inverse(lower) if inverse is None else inverse,
        reader=q * (scale * decay.entering),
        predictor=k * (beta * decay.entering),
        leaver=k * decay.leaving,
        finite=finite,
    )


def answer(chunk: Chunk, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the tokens read of the state [c, V], and the committed residuals [c, V]."""
    size = chunk.beta.shape[0]
    seen = product(jnp.concatenate([chunk.reader, chunk.predictor]), before)
    write = product(chunk.inverse, chunk.v * chunk.beta - seen[size:])
    return seen[:size] + product(chunk.attend, write), write


def outgoing(chunk: Chunk, before: jax.Array, write: jax.Array) -> jax.Array:
    """The state behind the chunk, from the one before it and the committed residuals."""
    return chunk.decay.keep * before + product(chunk.leaver, write, (0, 0))


def spoilt(chunk: Chunk, documents: jax.Array | None, before: jax.Array) -> jax.Array:
    """[c, 1]: `SPOILT` where a token, or one of its document before it, wrote what is not finite; 1 where its query alone
    is not; else 0. Padding counts to the token before it. `before` [1, 1] is the mark of the state that the chunk finds."""
    finite = chunk.finite
    written = to_row(jnp.where(finite.k, jnp.where(finite.v, 0.0, SPOILT), SPOILT))
    written = jnp.where(finite.gates, written, SPOILT)
    if documents is not None:
        written = jnp.where(documents[0:1] > 0, written, 0.0)
        before = jnp.where(to_column(documents[1:2]) == to_column(documents[2:3]), before, 0.0)
    here = jnp.max(jnp.where(chunk.decay.run, written, 0.0), axis=1, keepdims=True)
    return jnp.maximum(jnp.maximum(here, before), jnp.where(finite.q, 0.0, 1.0))


def mark_behind(marks: jax.Array) -> jax.Array:
    """The mark [1, 1] of the state behind a chunk whose tokens have `marks` [c, 1]."""
    return jnp.where(marks[marks.shape[0] - 1 :, :] == SPOILT, SPOILT, 0.0)


def marked(out: jax.Array, marks: jax.Array, documents: jax.Array | None) -> jax.Array:
    """Outputs with NaN where they are spoilt; those of padding stay 0."""
    if documents is not None:
        marks = jnp.where(to_column(documents[0:1]) > 0, marks, 0.0)
    return jnp.where(marks > 0.0, jnp.nan, out)


def norms(write: jax.Array) -> jax.Array:
    """The length of each committed residual beta e, as a row."""
    return to_row(jnp.sqrt(jnp.sum(write * write, axis=1, keepdims=True)))
