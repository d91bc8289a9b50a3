"""Products of decays inside a chunk, from log decays, without overflow and without cancellation.

A chunk needs exp(G_i - G_j) for j <= i, where G is the running sum of the log decays g. With strong gates |G| grows to
thousands and a float32 difference of two such sums has few digits left. So g is cut in two: multiples of a fixed grid,
whose sums are exact, and the small rest; sums and differences are taken of both apart. A running sum starts anew with each
document, so that no bit of one document depends on another. Whatever is exponentiated is at most 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from hola_jax.array_types import Array, Bool, Float, Int

STRONGEST = -104.0  # exp of it is 0 in float32, so stronger decays are as strong
GRID = 2.0**-9  # sums of 256 multiples of it down to STRONGEST are exact in float32
SUB_BLOCK = 16  # tokens whose per-channel decays are compared pair by pair


class DocumentMasks(NamedTuple):
    """Which tokens of a chunk may meet; all with axes to broadcast over heads."""

    same: Bool[Array, "... c c"]  # two tokens of one document
    run: Bool[Array, "... c c"]  # likewise, padding counted to the document before it
    enters: Bool[Array, "... c 1"]  # the token belongs to the document of the incoming state
    leaves: Bool[Array, "... c 1"]  # ... of the outgoing state
    stays: Bool[Array, "... 1 1"]  # incoming and outgoing state belong to one document


def document_before(documents: Int[Array, "B T"], initial: Int[Array, " B"]) -> Int[Array, "B U"]:
    """The document of the last real token before each of the T + 1 places (0: none yet); padding has id 0."""
    return lax.cummax(jnp.concatenate([initial[:, None], documents], axis=1), axis=1)


def document_masks(documents: Int[Array, "B T"], initial: Int[Array, " B"], chunk: int) -> DocumentMasks:
    """The masks of all chunks, stacked; `initial` is the document of the state that the first finds."""
    batch, length = documents.shape
    before = document_before(documents, initial)
    at_start = before[:, :-1:chunk].T[:, :, None]  # [n B 1]
    at_end = before[:, chunk::chunk].T[:, :, None]
    here, latest = (x.reshape(batch, length // chunk, chunk).transpose(1, 0, 2) for x in (documents, before[:, 1:]))
    real = here > 0

    def spread(mask: Array, *tail: int) -> Array:
        return mask.reshape(*mask.shape[:2], 1, 1, *tail)

    return DocumentMasks(
        same=spread((here[..., :, None] == here[..., None, :]) & real[..., None], chunk, chunk),
        run=spread(latest[..., :, None] == latest[..., None, :], chunk, chunk),
        enters=spread((here == at_start) & real, chunk, 1),
        leaves=spread((here == at_end) & real, chunk, 1),
        stays=spread(at_start == at_end, 1, 1),
    )


class RunningSum(NamedTuple):
    """Running sums over tokens (axis -2 of [..., c, X]), in two parts that are to be subtracted apart."""

    high: Float[Array, "..."]
    low: Float[Array, "..."]

    def since(self, start: RunningSum) -> Float[Array, "..."]:
        """Sum of the terms after `start` up to and including here; at most 0 where both belong to one document, and made so
        where they do not, since the result is masked only behind exp."""
        total = (self.high - start.high) + (self.low - start.low)
        return jnp.where(total > 0, 0.0, total)  # jnp.minimum would halve the gradient of decays that are exactly 0

    def at(self, index: int | slice) -> RunningSum:
        """The sum at one token (or a slice of tokens)."""
        keep = slice(index, index + 1 or None) if isinstance(index, int) else index
        return RunningSum(self.high[..., keep, :], self.low[..., keep, :])


class Decays(NamedTuple):
    """The decays of a chunk, 0 between tokens and states of different documents."""

    total: RunningSum
    causal: Bool[Array, "... c c"]  # pairs that may meet, j <= i
    entering: Float[Array, "... c X"]  # what is left of the incoming state at a token
    leaving: Float[Array, "... c X"]  # what is left of a token's write in the outgoing state
    keep: Float[Array, "... X 1"]  # what is left of the incoming state in the outgoing one


def running_sum(log_decay: Float[Array, "... c X"], run: Bool[Array, "... c c"] | None) -> RunningSum:
    """Inclusive running sums since the start of the chunk, or of the token's document in it.

    They are products with a triangle of ones: a sum that XLA fuses into what uses it is made again for every use."""
    length, width = log_decay.shape[-2:]
    clipped = jnp.maximum(log_decay, STRONGEST)
    low = lax.stop_gradient(clipped - GRID * jnp.round(clipped / GRID))
    ones = jnp.asarray(np.tri(length, dtype=np.float32))
    if run is not None:
        ones = jnp.where(run, ones, 0.0)
    parts = jnp.concatenate([clipped - low, low], axis=-1)
    sums = jnp.matmul(ones, parts, precision=lax.Precision.HIGHEST)
    return RunningSum(sums[..., :width], sums[..., width:])


def decays(log_decay: Float[Array, "... c X"], masks: DocumentMasks | None) -> Decays:
    """All decays of one chunk, or of several at once."""
    total = running_sum(log_decay, None if masks is None else masks.run)
    last = total.at(-1)
    causal = jnp.asarray(np.tri(log_decay.shape[-2], dtype=bool))
    entering, leaving, keep = jnp.exp(total.high + total.low), jnp.exp(last.since(total)), jnp.exp(last.high + last.low)
    if masks is not None:
        causal = causal & masks.same
        entering = jnp.where(masks.enters, entering, 0.0)
        leaving = jnp.where(masks.leaves, leaving, 0.0)
        keep = jnp.where(masks.stays, keep, 0.0)
    return Decays(total, causal, entering, leaving, jnp.swapaxes(keep, -1, -2))


def pair_decay(total: RunningSum, mask: Bool[Array, "... c c"]) -> Float[Array, "... c c"]:
    """exp(G_i - G_j) where `mask` allows the pair (i, j), else 0; for one decay per token ([..., c, 1])."""
    high, low = total.high[..., 0], total.low[..., 0]
    difference = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
    return jnp.exp(jnp.where(mask, difference, -jnp.inf))


def channel_pairs(total: RunningSum, mask: Bool[Array, "... b b"]) -> Float[Array, "... b b K"]:
    """exp(G_ik - G_jk) of every pair of a sub-block and every channel."""
    rows, columns = (RunningSum(*(jnp.expand_dims(part, axis) for part in total)) for axis in (-2, -3))
    return jnp.exp(jnp.where(mask[..., None], rows.since(columns), -jnp.inf))


def decayed_products(
    left: Float[Array, "... c K"], right: Float[Array, "... c K"], total: RunningSum, mask: Bool[Array, "... c c"]
) -> Float[Array, "... c c"]:
    """sum_k left_ik right_jk exp(G_ik - G_jk) where `mask` allows the pair (which must imply j <= i), else 0.

    One decay per channel does not factor out of the sum over channels. Pairs in different sub-blocks meet at the start
    of the later sub-block, where both exponents are at most 0; pairs inside a sub-block are taken one by one.
    """
    length = left.shape[-2]
    rows = []
    for start in range(0, length, SUB_BLOCK):
        here = slice(start, min(start + SUB_BLOCK, length))
        inside = total.at(here)
        decay = channel_pairs(inside, mask[..., here, here])
        near = jnp.sum(left[..., here, None, :] * right[..., None, here, :] * decay, axis=-1)
        blocks = [near, jnp.zeros((*near.shape[:-1], length - here.stop), near.dtype)]
        if start:
            meet, before = total.at(start - 1), total.at(slice(0, start))
            far = jnp.einsum(
                "...ik,...jk->...ij",
                left[..., here, :] * jnp.exp(inside.since(meet)),
                right[..., :start, :] * jnp.exp(meet.since(before)),
                precision=lax.Precision.HIGHEST,
            )
            blocks.insert(0, jnp.where(mask[..., here, :start], far, 0.0))
        rows.append(jnp.concatenate(blocks, axis=-1))
    return jnp.concatenate(rows, axis=-2)


def decayed_sums(
    weights: Float[Array, "... c c"], values: Float[Array, "... c X"], decay: Decays
) -> Float[Array, "... c X"]:
    """sum_j weights_ij values_jx exp(G_ix - G_jx) over the pairs that may meet.

    What `decayed_products` is to a sum over the channels that decay: the same sub-blocks keep all exponents at most 0.
    """
    total, mask, length = decay.total, decay.causal, values.shape[-2]
    rows = []
    for start in range(0, length, SUB_BLOCK):
        here = slice(start, min(start + SUB_BLOCK, length))
        inside = total.at(here)
        near = channel_pairs(inside, mask[..., here, here]) * values[..., None, here, :]
        row = jnp.einsum("...ij,...ijx->...ix", weights[..., here, here], near, precision=lax.Precision.HIGHEST)
        if start:
            meet = total.at(start - 1)
            far = jnp.where(mask[..., here, :start], weights[..., here, :start], 0.0)
            before = values[..., :start, :] * jnp.exp(meet.since(total.at(slice(0, start))))
            row = row + jnp.exp(inside.since(meet)) * jnp.matmul(far, before, precision=lax.Precision.HIGHEST)
        rows.append(row)
    return jnp.concatenate(rows, axis=-2)
