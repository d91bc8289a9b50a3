"""States that forget channel by channel and are written without being looked at: S -> Diag(keep) S + added.

Gated linear attention (`linear`) has one, GSA (`slots`) has two. Without the delta rule's correction nothing inside a
chunk has to be solved, and joining two runs of tokens costs no more than their sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Float, Int
from hola_jax.memory.decay import DocumentMasks, decayed_products, decays, document_masks, pair_decay
from hola_jax.memory.delta_rule import GROUP, HIGHEST, from_chunks, to_chunks
from hola_jax.memory.scan import Strategy, axis_scan, prefix_scan

States = tuple[Float[Array, "... X _"], ...]  # all decay along X together


class Element(NamedTuple):
    """What a run of tokens does to the states."""

    keep: Float[Array, "... X 1"]
    added: States


def act(element: Element, states: States) -> States:
    return tuple(element.keep * state + added for state, added in zip(states, element.added, strict=True))


def combine(left: Element, right: Element) -> Element:
    return Element(right.keep * left.keep, act(right, left.added))


def run_chunks(
    summarise: Callable[[Any], Element],
    read: Callable[[Any, States], Array],
    chunks: Any,
    initial: States,
    strategy: Strategy,
    axis: str | None = None,
) -> tuple[Array, States]:
    """(what `read` gives for each chunk and the states before it, the states after the last chunk).

    With `axis` (inside shard_map) the chunks are this device's part, and the states returned follow the last device's.
    """
    last = None
    if axis is not None:
        initial, last = axis_scan(act, _whole(summarise, chunks), initial, axis)
    count = jax.tree.leaves(chunks)[0].shape[0]
    group = count if strategy == "associative" else max(m for m in range(1, GROUP + 1) if count % m == 0)

    @partial(jax.checkpoint, prevent_cse=False)  # a chunk's matrices are cheaper to make again than to store
    def step(states: States, run: Any) -> tuple[States, Array]:
        before, after = prefix_scan(act, combine, summarise(run), states, strategy)
        return after, read(run, before)

    grouped = jax.tree.map(lambda x: x.reshape(count // group, group, *x.shape[1:]), chunks)
    final, out = lax.scan(step, initial, grouped)
    return out.reshape(count, *out.shape[2:]), (final if last is None else last)


def _whole(summarise: Callable[[Any], Element], chunks: Any) -> Element:
    """All chunks as one element."""

    @partial(jax.checkpoint, prevent_cse=False)
    def step(run: Element, chunk: Any) -> tuple[Element, None]:
        return combine(run, summarise(chunk)), None

    first = summarise(jax.tree.map(lambda x: x[0], chunks))
    return lax.scan(step, first, jax.tree.map(lambda x: x[1:], chunks))[0]


def chunked(
    arrays: tuple[Float[Array, "B T _ _"], ...],
    key_heads: int,
    chunk: int,
    documents: Int[Array, "B T"] | None,
    document: Int[Array, " B"],
) -> tuple[tuple[Float[Array, "n B h _ c _"], ...], DocumentMasks | None]:
    """Arrays of tokens in float32 and whole chunks, and the masks of their documents; `document` is that before them.
    Zeros (no decay, nothing written) stand for padding and fill the last chunk."""
    if documents is not None:
        arrays = tuple(jnp.where(documents[..., None, None] > 0, x, 0) for x in arrays)
    tail = -arrays[0].shape[1] % chunk
    padded = (jnp.pad(x.astype(jnp.float32), [(0, 0), (0, tail), (0, 0), (0, 0)]) for x in arrays)
    masks = None
    if documents is not None:
        masks = document_masks(jnp.pad(documents, [(0, 0), (0, tail)]), document, chunk)
    return tuple(to_chunks(x, chunk, key_heads) for x in padded), masks


class _Chunk(NamedTuple):
    q: Float[Array, "... c K"]
    k: Float[Array, "... c K"]
    v: Float[Array, "... c V"]
    log_decay: Float[Array, "... c X"]  # X is 1, or K for a decay per channel
    masks: DocumentMasks | None


def _summarise(chunk: _Chunk) -> Element:
    decay = decays(chunk.log_decay, chunk.masks)
    added = jnp.einsum("...ck,...cv->...kv", chunk.k * decay.leaving, chunk.v, precision=HIGHEST)
    return Element(decay.keep, (added,))


def _read(chunk: _Chunk, states: States) -> Float[Array, "... c V"]:
    decay = decays(chunk.log_decay, chunk.masks)
    if chunk.log_decay.shape[-1] > 1:
        attend = decayed_products(chunk.q, chunk.k, decay.total, decay.causal)
    else:
        attend = jnp.einsum("...ik,...jk->...ij", chunk.q, chunk.k, precision=HIGHEST)
        attend = attend * pair_decay(decay.total, decay.causal)
    seen = jnp.matmul(chunk.q * decay.entering, states[0], precision=HIGHEST)
    return seen + jnp.matmul(attend, chunk.v, precision=HIGHEST)


def gated_linear_attention(
    q: Float[Array, "B T h K"],
    k: Float[Array, "B T h K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"],
    *,
    scale: float,
    chunk: int,
    strategy: Strategy,
    documents: Int[Array, "B T"] | None,
    initial: Float[Array, "B H K V"],
    initial_document: Int[Array, " B"],
    sequence_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Outputs and the final state of S_t = Diag(exp g_t) S_{t-1} + k_t v_t', o_t = scale S_t' q_t; as `delta_rule`."""
    (batch, length, heads, _), key_heads = v.shape, k.shape[2]
    decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    (q, k, v, decay), masks = chunked((q * scale, k, v, decay), key_heads, chunk, documents, initial_document)
    state = initial.reshape(batch, key_heads, heads // key_heads, *initial.shape[2:])
    chunks = _Chunk(q, k, v, decay, masks)
    out, (final,) = run_chunks(_summarise, _read, chunks, (state,), strategy, sequence_axis)
    return from_chunks(out, length), final.reshape(initial.shape)
