"""NaN and inf in the input: they reach the outputs of their own document from their token on, and nothing else.

Inside a chunk all tokens share matrix products, where 0 * NaN would spread through every mask. So the arithmetic runs on
inputs without them, and what they would have spoilt is marked afterwards. A spoilt state is one that holds NaN. A TPU's
kernels do the same on the chip, where it costs no memory (pallas_kernels/delta_rule/chunk.py).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Bool, Float, Int
from hola_jax.memory.scan import axis_scan


def not_finite(x: Float[Array, "B T H ..."]) -> Bool[Array, "B T H"]:
    """Whether anything of a token and head is NaN or infinite."""
    # 0 * x is NaN just where x is not finite, and a sum keeps it: one pass, where a table of truths would be stored.
    return jnp.isnan(jnp.sum(0 * x, axis=tuple(range(3, x.ndim))))


def cleaned(x: Array, bad: Bool[Array, "B T H"]) -> Array:
    """`x` with zeros for the tokens and heads named by `bad`."""
    return jnp.where(bad.reshape(*bad.shape, *[1] * (x.ndim - 3)), 0, x)


def spoilt_since(
    bad: Bool[Array, "B T H"],
    documents: Int[Array, "B T"] | None,
    incoming: Bool[Array, "B H"],
    incoming_document: Int[Array, " B"],
) -> Bool[Array, "B T H"]:
    """Whether a token stands at or behind a bad one of its own document. Padding tells of the last real token."""
    length = bad.shape[1]
    if documents is None:
        return (lax.cummax(bad.astype(jnp.int8), axis=1) > 0) | incoming[:, None]
    before = lax.cummax(jnp.concatenate([incoming_document[:, None], documents], axis=1), axis=1)
    place = jnp.arange(length, dtype=jnp.int32)
    starts = lax.cummax(jnp.where(before[:, 1:] != before[:, :-1], place, -1), axis=1)
    last_bad = lax.cummax(jnp.where(bad, place[:, None], -2), axis=1)
    continues = (before[:, 1:] == incoming_document[:, None])[..., None]
    return (last_bad >= jnp.maximum(starts, 0)[..., None]) | (incoming[:, None] & continues)


def spoil(x: Array, spoilt: Bool[Array, "..."]) -> Array:
    """NaN where `spoilt`, which lacks the trailing axes of `x`."""
    return jnp.where(spoilt.reshape(*spoilt.shape, *[1] * (x.ndim - spoilt.ndim)), jnp.nan, x)


def finite_together(*arrays: Float[Array, "B T H ..."]) -> tuple[tuple[Array, ...], Bool[Array, "B T H"]]:
    """The arrays with zeros for the tokens and heads where any of them is not finite, and which those are."""
    bad = not_finite(arrays[0])
    for x in arrays[1:]:
        bad = bad | not_finite(x)
    return tuple(cleaned(x, bad) for x in arrays), bad


class Cleared(NamedTuple):
    """Tokens and states without NaN and inf, and what those would have spoilt."""

    q: Float[Array, "B T h K"]
    k: Float[Array, "B T h K"]
    v: Float[Array, "B T H V"]
    gates: tuple[Array, ...]
    states: tuple[Array, ...]
    spoilt: Bool[Array, "B T H"]  # outputs that are NaN
    spoilt_last: Bool[Array, "B H"]  # whether the states after the last token are


def cleared(
    q: Float[Array, "B T h K"],
    k: Float[Array, "B T h K"],
    v: Float[Array, "B T H V"],
    gates: tuple[Array, ...],
    states: tuple[Float[Array, "B H ..."], ...],
    documents: Int[Array, "B T"] | None,
    document: Int[Array, " B"],
    axis: str | None = None,
    *,
    fresh: bool,
) -> Cleared:
    """A query spoils its own output; a key, a value and `gates` ([B, T, H, ...]) spoil what comes after, too.

    `documents` is None where all tokens belong to one document, that of `states`; `document` is the states' own. `fresh`
    states are empty: nobody looks for NaN in them, which compilers would do once for every number of the constant.
    """
    ((q,), bad_query), ((k,), bad_key), ((v,), bad_value) = (finite_together(x) for x in (q, k, v))
    gates, bad_gates = finite_together(*gates)
    bad = bad_value | bad_gates
    group = bad.shape[2] // k.shape[2]
    written = bad | jnp.repeat(bad_key, group, axis=2)
    if documents is not None:
        written = written & (documents > 0)[..., None]
    incoming = jnp.zeros((bad.shape[0], bad.shape[2]), bool)
    if not fresh:
        incoming = jnp.stack([~jnp.isfinite(x).all(tuple(range(2, x.ndim))) for x in states]).any(0)
    if axis is not None:
        (document, incoming), (_, last) = around_device(written, documents, incoming, document, axis)
    spoilt = spoilt_since(written, documents, incoming, document)
    if axis is None:
        last = spoilt[:, -1]
    asked = spoilt | jnp.repeat(bad_query, group, axis=2)
    return Cleared(
        q=q,
        k=k,
        v=v,
        gates=gates,
        states=states if fresh else tuple(jnp.where(jnp.isfinite(x), x, 0.0) for x in states),
        spoilt=asked if documents is None else asked & (documents > 0)[..., None],
        spoilt_last=last,
    )


def around_device(
    bad: Bool[Array, "B T H"],
    documents: Int[Array, "B T"] | None,
    incoming: Bool[Array, "B H"],
    document: Int[Array, " B"],
    axis: str,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """(document, whether it is spoilt) before this device's tokens and after the last device's, inside shard_map."""
    if documents is None:  # one document, whatever its id
        documents, document = jnp.ones(bad.shape[:2], jnp.int32), jnp.ones_like(document)
    last = jnp.max(documents, axis=1)
    element = (last, jnp.any(bad & (documents == last[:, None])[..., None], axis=1))

    def act(element: tuple[Array, Array], state: tuple[Array, Array]) -> tuple[Array, Array]:
        (last, spoilt), (document, before) = element, state
        continues = (last == document) | (last == 0)
        return jnp.maximum(last, document), spoilt | (before & continues[:, None])

    return axis_scan(act, element, (document, incoming), axis)
