"""The memories that are a state alone: Gated DeltaNet, DeltaNet, KDA (the delta rule) and GLA (plain gated writes)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hola_jax.array_types import Array, Float, Int, Int32
from hola_jax.memory import by_kernels, kernels, poison, validate
from hola_jax.memory.decay import document_before
from hola_jax.memory.delta_rule import HIGHEST, choose_scan, delta_rule, delta_rule_token
from hola_jax.memory.diagonal import gated_linear_attention
from hola_jax.memory.norms import unit_l2
from hola_jax.memory.reference_linear import linear_reference
from hola_jax.memory.scan import axis_scan
from hola_jax.memory.state import Scan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearState:
    """All that a layer without a cache remembers of a prefix."""

    fast_weights: Float[Array, "B H K V"]  # S, float32
    document: Int32[Array, " B"]  # segment id of the last real token; 0 before any


def init_linear_state(batch: int, heads: int, key_dim: int, value_dim: int) -> LinearState:
    """The memory of an empty prefix."""
    return LinearState(jnp.zeros((batch, heads, key_dim, value_dim), jnp.float32), jnp.zeros(batch, jnp.int32))


def linear_memory(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    log_decay: Array,
    *,
    scale: float,
    normalise: bool = True,
    chunk: int = 64,
    scan: Scan = "auto",
    segment_ids: Array | None = None,
    state: LinearState | None = None,
    implementation: kernels.Implementation | None = None,
    check: bool = False,
    sequence_axis: str | None = None,
) -> tuple[Array, LinearState]:
    """What the state answers to each token, and the state after the last: ([B, T, H, V] in v's type, LinearState).

    q, k [B, T, h, K] and v [B, T, H, V] come after convolution and SiLU; h key heads serve H value heads. `normalise`
    brings q and k to unit length. log_decay [B, T, H] (or per key channel, [B, T, H, K]) is at most 0. Any T >= 1.

    beta            [B, T, H] in [0, 2]: the delta rule writes what the state did not know; None: it writes v (GLA).
    scale           factor on the output.
    chunk, scan     change speed, not meaning (see MemoryConfig).
    segment_ids     [B, T] integers: the document of each token, not decreasing along a row, 0 for padding. Documents do not
                    see each other and padding is as if it were not there. None: all tokens belong to one document, that of
                    `state` where it has one.
    state           continues an earlier piece; None starts empty. One token with a state takes the decoding path.
    implementation  as in `hola_memory`; there are kernels for the delta rule with one decay per token.
    check           also test what only values can tell (ranges, order of segment ids); inside jit it needs checkify.
    sequence_axis   inside shard_map: the mesh axis along which T is sharded. The state that comes back is that of the whole
                    sequence.
    """
    validate.qkv(q, k, v, beta, log_decay)
    batch, length, heads, value_dim = v.shape
    validate.segments(segment_ids, batch, length)
    validate.chunks(chunk, scan)
    work = kernels.work_of(q, k, v, delta=beta is not None, channels=log_decay.ndim == 4)
    chosen = kernels.choose(implementation, work, sequence_axis)
    fresh = state is None
    if state is None:
        state = init_linear_state(batch, heads, k.shape[3], value_dim)
    shapes = {"fast_weights": (batch, heads, k.shape[3], value_dim), "document": (batch,)}
    validate.check_state(state, LinearState, "init_linear_state", shapes)
    if check:
        validate.decay_values(beta, log_decay)
        validate.segment_values(segment_ids, None if fresh else state.document)

    several, documents, document = documents_of(segment_ids, state.document, length)
    before, last = documents_around(documents, document, sequence_axis)
    one_token = length == 1 and not fresh and sequence_axis is None
    run = None if one_token else kernels.kernels(chosen)
    rule = Rule(scale, normalise, chunk, scan, several, documents, before, sequence_axis)
    if run is not None and run.contained and sequence_axis is None:
        out, final = _by_kernels(run, q, k, v, beta, log_decay, state.fast_weights, rule)
        return out, LinearState(final, last)
    gates, weights = (log_decay,) if beta is None else (log_decay, beta), (state.fast_weights,)
    clear = poison.cleared(q, k, v, gates, weights, several, document, sequence_axis, fresh=fresh)
    tokens = clear.q, clear.k, clear.v, clear.gates[1] if len(gates) == 2 else None, clear.gates[0]
    if run is not None:
        out, final = _by_kernels(run, *tokens, clear.states[0], rule)
    else:
        out, final = _by_xla(*tokens, clear.states[0], rule, token_by_token=chosen.name == "reference", one=one_token)
    out = poison.spoil(out, clear.spoilt).astype(v.dtype)
    return out, LinearState(poison.spoil(final, clear.spoilt_last), last)


class Rule(NamedTuple):
    """What a call is told beside its tokens and the state."""

    scale: float
    normalise: bool
    chunk: int
    scan: Scan
    several: Int[Array, "B T"] | None  # the document of each token where they may differ
    documents: Int[Array, "B T"]
    before: Int32[Array, " B"]  # the document of the state that the first token finds
    sequence_axis: str | None


def _by_kernels(
    run: kernels.Kernels, q: Array, k: Array, v: Array, beta: Array | None, log_decay: Array, state: Array, rule: Rule
) -> tuple[Array, Array]:
    """(outputs, the state after them)."""
    assert beta is not None
    found = by_kernels.delta_rule(
        run,
        q,
        k,
        v,
        beta,
        log_decay,
        scale=rule.scale,
        normalise=rule.normalise,
        documents=rule.several,
        initial=state,
        initial_document=rule.before,
        magnitude=None,
        out_dtype=v.dtype,
        sequence_axis=rule.sequence_axis,
    )
    return found.out, found.final


def _by_xla(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    log_decay: Array,
    state: Array,
    rule: Rule,
    *,
    token_by_token: bool,
    one: bool,
) -> tuple[Array, Array]:
    """(outputs, the state after them): by the specification, as `one` token that continues, or over chunks."""
    q, k = (unit_l2(x) if rule.normalise else x.astype(jnp.float32) for x in (q, k))
    if token_by_token:
        return linear_reference(q, k, v, beta, log_decay, rule.scale, rule.documents, state, rule.before)
    if one:
        return _token(q, k, v, beta, log_decay, rule.scale, rule.documents[:, 0], state, rule.before)
    given: dict[str, Any] = {
        "scale": rule.scale,
        "chunk": rule.chunk,
        "documents": rule.several,
        "initial": state,
        "initial_document": rule.before,
        "sequence_axis": rule.sequence_axis,
    }
    if beta is None:
        return gated_linear_attention(q, k, v, log_decay, strategy=choose_scan(rule.scan), **given)
    found = delta_rule(q, k, v, beta, log_decay, scan=rule.scan, **given)
    return found.out, found.final


def _token(
    q: Float[Array, "B 1 h K"],
    k: Float[Array, "B 1 h K"],
    v: Float[Array, "B 1 H V"],
    beta: Float[Array, "B 1 H"] | None,
    log_decay: Array,
    scale: float,
    here: Int32[Array, " B"],
    state: Float[Array, "B H K V"],
    document: Int32[Array, " B"],
) -> tuple[Float[Array, "B 1 H V"], Float[Array, "B H K V"]]:
    """One token of every row: the decoding path; padding changes nothing."""
    group = v.shape[2] // k.shape[2]
    q, k = (jnp.repeat(x[:, 0], group, axis=1) for x in (q, k))
    start = jnp.where((here == document)[:, None, None, None], state, 0.0)
    if beta is None:
        decay = log_decay[:, 0] if log_decay.ndim == 4 else log_decay[:, 0, :, None]
        after = jnp.exp(decay.astype(jnp.float32))[..., None] * start
        after = after + k[..., None] * v[:, 0, :, None].astype(jnp.float32)
        out = scale * jnp.einsum("bhk,bhkv->bhv", q, after, precision=HIGHEST)
    else:
        beta, log_decay = (x[:, 0].astype(jnp.float32) for x in (beta, log_decay))
        out, _, after = delta_rule_token(q, k, v[:, 0], beta, log_decay, start, scale)
    real = (here > 0)[:, None, None]
    return jnp.where(real, out, 0.0)[:, None], jnp.where(real[..., None], after, state)


def documents_of(
    segment_ids: Array | None, document: Int32[Array, " B"], length: int
) -> tuple[Int32[Array, "B T"] | None, Int32[Array, "B T"], Int32[Array, " B"]]:
    """(segment ids, the document of each token, that of the state). Without segment ids there is one document, the state's,
    and nothing needs to be told apart."""
    if segment_ids is not None:
        return segment_ids.astype(jnp.int32), segment_ids.astype(jnp.int32), document
    document = jnp.maximum(document, 1)
    return None, jnp.broadcast_to(document[:, None], (document.shape[0], length)), document


def documents_around(
    documents: Int[Array, "B T"], document: Int32[Array, " B"], axis: str | None
) -> tuple[Int32[Array, " B"], Int32[Array, " B"]]:
    """The document of the last real token before these tokens, and after the last (of the last device)."""
    if axis is None:
        return document, document_before(documents, document)[:, -1]
    return axis_scan(jnp.maximum, jnp.max(documents, axis=1), document, axis)
