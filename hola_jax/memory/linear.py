"""The memories that are a state alone: Gated DeltaNet, DeltaNet, KDA (the delta rule) and GLA (plain gated writes)."""

from __future__ import annotations

import dataclasses

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
    chosen = kernels.choose(implementation, work, sequence_axis).name
    fresh = state is None
    if state is None:
        state = init_linear_state(batch, heads, k.shape[3], value_dim)
    shapes = {"fast_weights": (batch, heads, k.shape[3], value_dim), "document": (batch,)}
    validate.check_state(state, LinearState, "init_linear_state", shapes)
    if check:
        validate.decay_values(beta, log_decay)
        validate.segment_values(segment_ids, None if fresh else state.document)

    several, documents, document = documents_of(segment_ids, state.document, length)
    others = (v, log_decay) if beta is None else (v, log_decay, beta)
    clear = poison.cleared(q, k, others, (state.fast_weights,), several, document, sequence_axis, fresh=fresh)
    (values, log_decay, *gate), (fast_weights,) = clear.others, clear.states
    beta = gate[0] if gate else None
    before, last = documents_around(documents, document, sequence_axis)
    one_token = length == 1 and not fresh and sequence_axis is None
    by_kernel = None if one_token else kernels.kernels(chosen)
    if by_kernel is not None:
        assert beta is not None
        out, _, final = by_kernels.delta_rule(
            by_kernel,
            clear.q,
            clear.k,
            values,
            beta,
            log_decay,
            scale=scale,
            normalise=normalise,
            documents=several,
            initial=fast_weights,
            initial_document=before,
            magnitude=None,
            out_dtype=v.dtype,
            sequence_axis=sequence_axis,
        )
        out = poison.spoil(out, clear.spoilt)
        return out, LinearState(poison.spoil(final, clear.spoilt_last), last)
    q, k = (unit_l2(x) if normalise else x.astype(jnp.float32) for x in (clear.q, clear.k))
    if chosen == "reference":
        out, final = linear_reference(q, k, values, beta, log_decay, scale, documents, fast_weights, before)
    elif one_token:
        out, final = _token(q, k, values, beta, log_decay, scale, documents[:, 0], fast_weights, before)
    elif beta is None:
        out, final = gated_linear_attention(
            q,
            k,
            values,
            log_decay,
            scale=scale,
            chunk=chunk,
            strategy=choose_scan(scan),
            documents=several,
            initial=fast_weights,
            initial_document=before,
            sequence_axis=sequence_axis,
        )
    else:
        out, _, final = delta_rule(
            q,
            k,
            values,
            beta,
            log_decay,
            scale=scale,
            chunk=chunk,
            scan=scan,
            documents=several,
            initial=fast_weights,
            initial_document=before,
            sequence_axis=sequence_axis,
        )
    out = poison.spoil(out, clear.spoilt).astype(v.dtype)
    return out, LinearState(poison.spoil(final, clear.spoilt_last), last)


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
