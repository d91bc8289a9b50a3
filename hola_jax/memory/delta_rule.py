"""The state S (the neocortex): the gated delta rule over chunks of tokens, and one token of it.

    S_t = Diag(exp g_t) S_{t-1} + beta_t k_t e_t',     e_t = v_t - k_t' Diag(exp g_t) S_{t-1},     o_t = scale S_t' q_t

Inside a chunk the recurrence is a triangular system (hola.md gives the algebra; letters as in `array_types`). Chunks are
joined by `scan.prefix_scan`: sequentially, carrying S through the low-rank form, or as affine maps S -> A S + B.
One decay per token (GDN, DeltaNet) and one per token and key channel (KDA) share all of it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from hola_jax.array_types import Array, Bool, Float, Int
from hola_jax.memory.decay import DocumentMasks, decayed_products, decays, document_masks, pair_decay
from hola_jax.memory.scan import Strategy, axis_scan, prefix_scan
from hola_jax.memory.triangular import unit_lower_inverse

HIGHEST = lax.Precision.HIGHEST
GROUP = 4  # chunks whose matrices are made together

Magnitude = Literal["surprise", "residual"]


class DeltaRuleResult(NamedTuple):
    out: Float[Array, "B T H V"]
    magnitude: Float[Array, "B T H"] | None  # beta_t |e_t| or |e_t|, whichever was asked for; without gradient
    final: Float[Array, "B H K V"]
    states: Float[Array, "n B H K V"] | None = None  # after each `every` tokens, where asked for; without gradient


class Tokens(NamedTuple):
    """A run of chunks: [n, B, h, r, c, ...] with r = H / h value heads per key head, or one of them without n."""

    q: Float[Array, "... c K"]
    k: Float[Array, "... c K"]
    v: Float[Array, "... c V"]
    beta: Float[Array, "... c 1"]
    log_decay: Float[Array, "... c X"]  # X is 1, or K for a decay per channel


class Factors(NamedTuple):
    """What a chunk does to a state, as matrices."""

    readers: Float[
        Array, "... 2c K"
    ]  # scale exp(G) q (reads the incoming state), below it beta exp(G) k (its prediction)
    leavers: Float[Array, "... c K"]  # exp(G_c - G) k: writes the outgoing state
    keep: Float[Array, "... X 1"]  # exp(G_c): what is left of the incoming state
    attend: Float[Array, "... c c"]  # scale q_i' k_j with decays, j <= i
    lower: Float[Array, "... c c"]  # beta_i k_i' k_j with decays, j < i
    values: Float[Array, "... c V"]  # beta v


def choose_scan(strategy: Literal["auto", "sequential", "associative"]) -> Strategy:
    """ "auto" is "sequential": per chunk, joining two affine maps costs K K (K + V) multiply-adds beside the 2 c K V of
    carrying S, so the parallel scan can pay only where B H chains are too few to fill the chip. It was never the faster
    one on a CPU (`python benchmarks/cpu.py --scan` prints both)."""
    return "sequential" if strategy == "auto" else strategy


def to_chunks(x: Float[Array, "B T H X"], chunk: int, key_heads: int) -> Float[Array, "n B h r c X"]:
    batch, length, heads, width = x.shape
    x = x.reshape(batch, length // chunk, chunk, key_heads, heads // key_heads, width)
    return x.transpose(1, 0, 3, 4, 2, 5)


def from_chunks(x: Float[Array, "n B h r c X"], length: int) -> Float[Array, "B T H X"]:
    """The first `length` tokens of a run of chunks."""
    chunks, batch, key_heads, group, chunk, width = x.shape
    x = x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, chunks * chunk, key_heads * group, width)
    return x[:, :length]


def factorise(tokens: Tokens, masks: DocumentMasks | None, scale: float) -> Factors:
    """The matrices of one chunk, or of several at once."""
    q, k, v, beta, log_decay = tokens
    decay = decays(log_decay, masks)
    strict = decay.causal & jnp.asarray(np.tri(q.shape[-2], k=-1, dtype=bool))
    if log_decay.shape[-1] > 1:
        attend = decayed_products(q * scale, k, decay.total, decay.causal)
        lower = decayed_products(k, k, decay.total, strict)
    else:
        pairs = pair_decay(decay.total, decay.causal)
        attend = jnp.einsum("...ik,...jk->...ij", q, k, precision=HIGHEST) * (pairs * scale)
        lower = jnp.einsum("...ik,...jk->...ij", k, k, precision=HIGHEST) * jnp.where(strict, pairs, 0.0)
    return Factors(
        readers=jnp.concatenate([q * (scale * decay.entering), k * (beta * decay.entering)], axis=-2),
        leavers=k * decay.leaving,
        keep=decay.keep,
        attend=attend,
        lower=lower * beta,
        values=v * beta,
    )


@jax.custom_vjp
def carry_state(factors: Factors, initial: Array) -> tuple[Array, Array, Array]:
    """(outputs, committed residuals beta e, final state) of chunks in order, S carried from one to the next."""
    return _carry_forward(factors, initial)[0]


def _carry_forward(factors: Factors, initial: Array) -> tuple[tuple[Array, Array, Array], tuple[Any, ...]]:
    length = factors.attend.shape[-1]
    inverse = checkpoint_name(unit_lower_inverse(factors.lower), "chunk_inverse")

    def step(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        reader, leaver, keep, value, solve = chunk
        seen = jnp.matmul(reader, state, precision=HIGHEST)
        write = jnp.matmul(solve, value - seen[..., length:, :], precision=HIGHEST)
        added = jnp.einsum("...ck,...cv->...kv", leaver, write, precision=HIGHEST)
        return keep * state + added, (state, seen[..., :length, :], write)

    xs = (factors.readers, factors.leavers, factors.keep, factors.values, inverse)
    final, (before, seen, writes) = lax.scan(step, initial, xs)
    before, writes = checkpoint_name(before, "chunk_state"), checkpoint_name(writes, "chunk_writes")
    out = seen + jnp.matmul(factors.attend, writes, precision=HIGHEST)
    kept = (factors.readers, factors.leavers, factors.keep, factors.attend)
    return (out, writes, final), (*kept, inverse, writes, before)


def _carry_backward(saved: tuple[Any, ...], cotangents: tuple[Array, Array, Array]) -> tuple[Factors, Array]:
    readers, leavers, keep, attend, inverse, writes, before = saved
    d_out, d_writes, d_final = cotangents
    length = attend.shape[-1]
    d_writes = d_writes + jnp.einsum("...ij,...iv->...jv", attend, d_out, precision=HIGHEST)

    def step(d_state: Array, chunk: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        reader, leaver, kept, solve, d_write, d_seen = chunk
        d_write = d_write + jnp.matmul(leaver, d_state, precision=HIGHEST)
        d_value = jnp.einsum("...ij,...iv->...jv", solve, d_write, precision=HIGHEST)
        d_seen = jnp.concatenate([d_seen, -d_value], axis=-2)
        d_before = kept * d_state + jnp.einsum("...ck,...cv->...kv", reader, d_seen, precision=HIGHEST)
        return d_before, (d_state, d_seen)

    xs = (readers, leavers, keep, inverse, d_writes, d_out)
    d_initial, (d_after, d_seen) = lax.scan(step, d_final, xs, reverse=True)
    d_readers = jnp.einsum("...cv,...kv->...ck", d_seen, before, precision=HIGHEST)
    d_pairs = jnp.einsum("...iv,...jv->...ij", d_seen, writes, precision=HIGHEST)
    d_keep = jnp.sum(before * d_after, axis=-1, keepdims=True)
    if keep.shape[-2] == 1:
        d_keep = jnp.sum(d_keep, axis=-2, keepdims=True)
    gradient = Factors(
        readers=d_readers,
        leavers=jnp.einsum("...cv,...kv->...ck", writes, d_after, precision=HIGHEST),
        keep=d_keep,
        attend=d_pairs[..., :length, :],
        lower=d_pairs[..., length:, :],
        values=-d_seen[..., length:, :],
    )
    return gradient, d_initial


carry_state.defvjp(_carry_forward, _carry_backward)


class Affine(NamedTuple):
    """S -> linear S + offset: what a run of tokens does to the state."""

    linear: Float[Array, "... K K"]
    offset: Float[Array, "... K V"]


def act(element: Affine, state: Array) -> Array:
    return jnp.matmul(element.linear, state, precision=HIGHEST) + element.offset


def combine(left: Affine, right: Affine) -> Affine:
    return Affine(jnp.matmul(right.linear, left.linear, precision=HIGHEST), act(right, left.offset))


def join_affine(factors: Factors, initial: Array) -> tuple[Array, Array, Array, Array]:
    """What `carry_state` gives, by a parallel prefix scan over affine maps; and the states after each chunk."""
    length = factors.attend.shape[-1]
    inverse = unit_lower_inverse(factors.lower)
    queries, writers = factors.readers[..., :length, :], factors.readers[..., length:, :]
    values = jnp.matmul(inverse, factors.values, precision=HIGHEST)
    writers = jnp.matmul(inverse, writers, precision=HIGHEST)
    removed, added = (
        jnp.einsum("...ck,...cx->...kx", factors.leavers, x, precision=HIGHEST) for x in (writers, values)
    )
    elements = Affine(factors.keep * jnp.eye(writers.shape[-1], dtype=jnp.float32) - removed, added)
    before, final = prefix_scan(act, combine, elements, initial, "associative")
    writes = values - jnp.matmul(writers, before, precision=HIGHEST)
    out = jnp.matmul(queries, before, precision=HIGHEST) + jnp.matmul(factors.attend, writes, precision=HIGHEST)
    return out, writes, final, lax.stop_gradient(jnp.concatenate([before[1:], final[None]]))


# Kept for the backward pass of a group of chunks; a chunk's other matrices are cheaper to make again than to store.
_KEPT = jax.checkpoint_policies.save_only_these_names("chunk_inverse", "chunk_writes", "chunk_state")


def _carry_groups(
    tokens: Tokens, masks: DocumentMasks | None, scale: float, initial: Array, every: int | None = None
) -> tuple[Array, Array, Array, Array | None]:
    """`carry_state` with a few chunks' matrices alive at a time: what is in flight fits a cache and does not grow with T.
    And the states after each `every` chunks."""
    chunks = tokens.q.shape[0]
    group = max(m for m in range(1, GROUP + 1) if (every or chunks) % m == 0)

    def step(state: Array, run: tuple[Tokens, DocumentMasks | None]) -> tuple[Array, tuple[Array, Array, Array | None]]:
        out, writes, final = carry_state(factorise(*run, scale), state)
        return final, (out, writes, None if every is None else lax.stop_gradient(final))

    step = jax.checkpoint(step, policy=_KEPT, prevent_cse=False)
    if group == chunks:
        final, (out, writes, after) = step(initial, (tokens, masks))
        return out, writes, final, None if after is None else after[None]
    grouped = jax.tree.map(lambda x: x.reshape(chunks // group, group, *x.shape[1:]), (tokens, masks))
    final, (*results, after) = lax.scan(step, initial, grouped)
    out, writes = (x.reshape(chunks, *x.shape[2:]) for x in results)
    return out, writes, final, None if after is None or every is None else after[every // group - 1 :: every // group]


def _states_around_device(
    tokens: Tokens, masks: DocumentMasks | None, initial: Array, axis: str
) -> tuple[Array, Array]:
    """(state before this device's tokens, state after the last device's): each device sends one affine map."""
    key_dim, value_dim = initial.shape[-2:]
    # The pair [offset | linear] carried through the chunks in place of S: values enter the offset alone.
    widened = tokens._replace(v=jnp.pad(tokens.v, [(0, 0)] * 5 + [(0, key_dim)]))
    identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=jnp.float32), (*initial.shape[:-1], key_dim))
    start = jnp.concatenate([jnp.zeros_like(initial), identity], axis=-1)
    run = _carry_groups(widened, masks, 1.0, start)[2]
    return axis_scan(act, Affine(run[..., value_dim:], run[..., :value_dim]), initial, axis)


def delta_rule(
    q: Float[Array, "B T h K"],
    k: Float[Array, "B T h K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"],
    *,
    scale: float,
    chunk: int = 64,
    scan: Literal["auto", "sequential", "associative"] = "auto",
    documents: Int[Array, "B T"] | None = None,
    initial: Float[Array, "B H K V"] | None = None,
    initial_document: Int[Array, " B"] | None = None,
    magnitude: Magnitude | None = None,
    every: int | None = None,
    sequence_axis: str | None = None,
) -> DeltaRuleResult:
    """Outputs, write magnitudes and the final state of any number of tokens; keys and queries come normalised.

    `documents` gives each token's id, 0 for padding, not decreasing along a row; the state starts anew with each. A state
    given as `initial` belongs to `initial_document`. With `sequence_axis` (inside shard_map) the tokens are this device's
    part of a longer sequence, and `final` is the state after the last device's. `every` asks for the states after that many
    tokens each: a multiple of the chunk that divides T.
    """
    batch, length, heads, value_dim = v.shape
    key_heads, key_dim = k.shape[2:]
    if magnitude == "residual":
        # e = write / beta needs a write: one too small to be seen in S, where beta is 0.
        beta = jnp.maximum(beta, 1e-30)
    if documents is not None:
        real = documents[..., None] > 0
        beta = jnp.where(real, beta, 0.0)
        log_decay = jnp.where(real if log_decay.ndim == 3 else real[..., None], log_decay, 0.0)
    decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    arrays = [x.astype(jnp.float32) for x in (q, k, v, beta[..., None], decay)]
    if tail := -length % chunk:
        arrays = [jnp.pad(x, [(0, 0), (0, tail), (0, 0), (0, 0)]) for x in arrays]
        documents = None if documents is None else jnp.pad(documents, [(0, 0), (0, tail)])
    tokens = Tokens(*(to_chunks(x, chunk, key_heads) for x in arrays))
    masks = None
    if documents is not None:
        before = jnp.zeros(batch, documents.dtype) if initial_document is None else initial_document
        masks = document_masks(documents, before, chunk)
    state = jnp.zeros((batch, heads, key_dim, value_dim), jnp.float32) if initial is None else initial
    state = state.reshape(batch, key_heads, heads // key_heads, key_dim, value_dim)
    if sequence_axis is not None:
        state, last = _states_around_device(tokens, masks, state, sequence_axis)
    if choose_scan(scan) == "associative":
        out, writes, final, after = join_affine(factorise(tokens, masks, scale), state)
        states = None if every is None else after[every // chunk - 1 :: every // chunk]
    else:
        chunks_between = None if every is None else every // chunk
        out, writes, final, states = _carry_groups(tokens, masks, scale, state, chunks_between)
    norms = None
    if magnitude is not None:
        squares = jnp.sum(jnp.square(lax.stop_gradient(writes)), axis=-1, keepdims=True)
        norms = from_chunks(jnp.sqrt(squares), length)[..., 0]
        norms = norms if magnitude == "surprise" else norms / lax.stop_gradient(jnp.where(beta > 0, beta, 1.0))
    final = final if sequence_axis is None else last
    states = None if states is None else states.reshape(-1, batch, heads, key_dim, value_dim)
    return DeltaRuleResult(from_chunks(out, length), norms, final.reshape(batch, heads, key_dim, value_dim), states)


def delta_rule_token(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    beta: Float[Array, "B H"],
    log_decay: Float[Array, "B H"] | Float[Array, "B H K"],
    state: Float[Array, "B H K V"],
    scale: float,
    begins: Bool[Array, " B"] | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """(output, error e, state) of one token; keys and queries come normalised and one per value head.

    Rows of the batch that are said to begin find an empty state. What key and query find in the old state is one pass over
    it, and the new state another: the query finds there what it found in the old one, and of the write what it shares with
    the key.
    """
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    keep = jnp.exp(log_decay if log_decay.ndim == 3 else log_decay[..., None])

    def of_old(x: Array) -> Array:
        return x if begins is None else jnp.where(begins.reshape(-1, *[1] * (x.ndim - 1)), 0.0, x)

    both = jnp.stack([k * keep, q * keep], axis=2)
    both = of_old(jnp.einsum("bhxk,bhkv->bhxv", both, state, precision=HIGHEST))
    expected, found = both[:, :, 0], both[:, :, 1]
    error = v - expected
    write = beta[..., None] * error
    state = of_old(keep[..., None] * state) + k[..., None] * write[..., None, :]
    return scale * (found + jnp.sum(q * k, axis=-1, keepdims=True) * write), error, state
