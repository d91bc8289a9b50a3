"""Which tokens each block finds in its cache, and the way of a row's gradient back to its token; plain XLA.

What a block finds is a prefix of top-W merges on scores alone, which needs no key and no value. A TPU has to interleave it
with the read, because there a gather costs a matrix product on the chip. A GPU decides it first: one sort of each block,
then log2(blocks) rounds in which sorted lists merge by counting who beats whom, W x W comparisons a pair that XLA fuses.
Then all blocks read at once. A row stays in successive caches, in slots that may differ; its gradient is summed along them
by gathers, 16 caches a round, in an order that never varies, without atomics. (Pairs would take log2(blocks) rounds, each of
which moves all rows; XLA makes one fused pass of a round.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.cache.arrays import Cache

RADIX = 16


class Found(NamedTuple):
    """The cache before each block, and last the one after all of them. A row's place is its slot in the cache that the
    call was given, or W + its token."""

    documents: Array  # [B, n + 1]
    scores: Array  # [B, H, n + 1, W], -inf where a row is empty
    places: Array  # [B, H, n + 1, W]


def found_by_blocks(scores: Array, documents: Array | None, whole: Array, cache: Cache, block: int) -> Found:
    """`scores` [B, H, T] and `documents` [B, T], of whole blocks; `whole` [B] of them compete."""
    batch, heads, length = scores.shape
    blocks, window = length // block, cache.scores.shape[2]
    ends = jnp.arange(blocks) < whole[:, None]
    if documents is None:
        latest = jnp.broadcast_to(cache.document[:, None], (batch, blocks))
        competes = jnp.broadcast_to(ends[:, :, None], (batch, blocks, block))
    else:
        by_block = documents.reshape(batch, blocks, block)
        latest = jnp.where(ends, jnp.max(by_block, axis=2), 0)
        competes = (by_block == latest[:, :, None]) & (by_block > 0) & ends[:, :, None]
    coming = jnp.where(competes[:, None], scores.reshape(batch, heads, blocks, block), -jnp.inf)
    best, index = lax.top_k(coming, min(window, block))
    places = window + index + block * jnp.arange(blocks, dtype=jnp.int32)[:, None]
    short = [(0, 0)] * 3 + [(0, window - best.shape[3])]
    best, places = jnp.pad(best, short, constant_values=-jnp.inf), jnp.pad(places, short)
    given = jnp.broadcast_to(jnp.arange(window, dtype=jnp.int32), cache.scores.shape)
    runs = Found(
        jnp.concatenate([cache.document[:, None], latest], axis=1).astype(jnp.int32),
        jnp.concatenate([cache.scores[:, :, None], best], axis=2),
        jnp.concatenate([given[:, :, None], places.astype(jnp.int32)], axis=2),
    )
    reach = 1
    while reach <= blocks:
        left = Found(runs.documents[:, :-reach], runs.scores[:, :, :-reach], runs.places[:, :, :-reach])
        right = Found(runs.documents[:, reach:], runs.scores[:, :, reach:], runs.places[:, :, reach:])
        merged = _merged(left, right)
        first = runs.documents[:, :reach], runs.scores[:, :, :reach], runs.places[:, :, :reach]
        axes = 1, 2, 2
        runs = Found(*(jnp.concatenate([a, b], axis=x) for a, b, x in zip(first, merged, axes, strict=True)))
        reach *= 2
    return runs


def _merged(left: Found, right: Found) -> Found:
    """The best of two sorted lists, of the later document; among equals those of the left."""
    document = jnp.maximum(left.documents, right.documents)
    window = left.scores.shape[-1]
    ours, theirs = (
        jnp.where((run.documents == document)[:, None, :, None], run.scores, -jnp.inf) for run in (left, right)
    )
    beaten = theirs[..., None, :] > ours[..., :, None]  # [W, W]: ours by theirs
    slots = jnp.arange(window, dtype=jnp.int32)
    our_rank = slots + jnp.sum(beaten, axis=-1, dtype=jnp.int32)
    their_rank = slots + jnp.sum(~beaten, axis=-2, dtype=jnp.int32)

    def taken(old: Array, new: Array, least: float | int) -> Array:
        stays = jnp.max(jnp.where(our_rank[..., None, :] == slots[:, None], old[..., None, :], least), axis=-1)
        enters = jnp.max(jnp.where(their_rank[..., None, :] == slots[:, None], new[..., None, :], least), axis=-1)
        return jnp.maximum(stays, enters)

    return Found(document, taken(ours, theirs, -jnp.inf), taken(left.places, right.places, -1))


def rows_of(tokens: Array, given: Array | None, found: Found) -> Array:
    """[B, H, m, W, X] of tokens [B, T, h, X] and the rows [B, H, W, X] of the given cache, None if that is empty; 0 where
    a row is empty."""
    batch, heads, _, window = found.places.shape
    b = jnp.arange(batch)[:, None, None, None]
    h = jnp.arange(heads)[:, None, None]
    token = jnp.maximum(found.places - window, 0)
    new = tokens.at[b, token, h // (heads // tokens.shape[2])].get(mode="promise_in_bounds")
    if given is not None:
        old = given.at[b, h, jnp.minimum(found.places, window - 1)].get(mode="promise_in_bounds")
        new = jnp.where((found.places < window)[..., None], old, new)
    return jnp.where((found.scores > -jnp.inf)[..., None], new, 0)


def positions_of(found: Found, given: Array, start: Array) -> Array:
    """[B, H, m, W], -1 where a row is empty."""
    window = found.places.shape[-1]
    old = jnp.take_along_axis(given[:, :, None], jnp.minimum(found.places, window - 1), axis=3)
    positions = jnp.where(found.places < window, old, start[:, None, None, None] + found.places - window)
    return jnp.where(found.scores > -jnp.inf, positions, -1)


def slots_later(found: Found, later: int) -> Array:
    """[B, H, n + 1 - later, W]: the slot that a row has so many caches on, -1 where it has left or is empty."""
    return _slots_of(_held(found)[:, :, : -later or None], _held(found)[:, :, later:])


def slots_entered(found: Found, block: int) -> Array:
    """[B, H, n, C]: the slot that a token of a block has in the cache behind it, -1 for none."""
    batch, heads, caches, window = found.places.shape
    tokens = window + jnp.arange((caches - 1) * block, dtype=jnp.int32).reshape(caches - 1, block)
    return _slots_of(jnp.broadcast_to(tokens, (batch, heads, *tokens.shape)), _held(found)[:, :, 1:])


def _held(found: Found) -> Array:
    return jnp.where(found.scores > -jnp.inf, found.places, -1)


def _slots_of(wanted: Array, held: Array) -> Array:
    there = (wanted[..., :, None] == held[..., None, :]) & (wanted[..., :, None] >= 0)
    slots = jnp.max(jnp.where(there, jnp.arange(held.shape[-1], dtype=jnp.int32), -1), axis=-1)
    return lax.optimization_barrier(slots)  # once for each row, not for each number of a row


def _picked(rows: Array, slots: Array) -> Array:
    """[..., X, K] of [..., W, K]; 0 for slot -1."""
    picked = jnp.take_along_axis(rows, jnp.maximum(slots, 0)[..., None], axis=-2, mode="promise_in_bounds")
    return jnp.where((slots >= 0)[..., None], picked, 0)


def along_stay(rows: Array, found: Found) -> Array:
    """[B, H, n + 1, W, X], float32: the sum of a row's gradient here and in all later caches that hold it."""
    reach, caches = 1, rows.shape[2]
    while reach < caches:
        total = rows
        for later in range(reach, min(RADIX * reach, caches), reach):
            of_later = _picked(rows[:, :, later:], slots_later(found, later))
            total = total + jnp.pad(of_later, [(0, later if axis == 2 else 0) for axis in range(5)])
        rows = total
        reach *= RADIX
    return rows


def to_tokens(rows: Array, entered: Array) -> Array:
    """[B, T, H, X] of the sums of rows [B, H, n + 1, W, X]: what each token gets from the caches that it is in."""
    batch, heads, blocks, block = entered.shape
    return _picked(rows[:, :, 1:], entered).reshape(batch, heads, blocks * block, -1).swapaxes(1, 2)
