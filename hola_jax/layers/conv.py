"""The short causal convolution in front of the delta rule, and the few tokens it remembers.

Documents do not see each other and padding is as if it were not there: a state holds the last real tokens, and they are
laid down right in front of the first real token that continues them. Padding may stand at either end of a row and
between documents, not inside one (the language model moves such padding to the end before any layer sees it).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental import checkify
from jax.typing import DTypeLike

from hola_jax.array_types import Array, Float, Int, Int32
from hola_jax.layers.lean import lean
from hola_jax.layers.vectors import made_first
from hola_jax.memory.scan import axis_scan


class ConvState(NamedTuple):
    """The last w - 1 real tokens of a row, the latest at the end."""

    inputs: Float[Array, "B r E"]
    documents: Int32[Array, "B r"]  # 0 where there was no token yet

    @property
    def document(self) -> Int32[Array, " B"]:
        """That of the last real token; 0 before any."""
        return jnp.max(self.documents, axis=1, initial=0)


def init_state(batch: int, channels: int, width: int, dtype: DTypeLike) -> ConvState:
    """What an empty prefix leaves."""
    return ConvState(jnp.zeros((batch, width - 1, channels), dtype), jnp.zeros((batch, width - 1), jnp.int32))


def _append(element: ConvState, state: ConvState) -> ConvState:
    """`state` after the tokens whose last ones are `element`."""
    rows = element.documents.shape[1]
    own = jnp.sum(element.documents > 0, axis=1, dtype=jnp.int32)[:, None]
    index = jnp.arange(rows, dtype=jnp.int32)[None]
    kept = jnp.minimum(index + own, rows - 1)
    new = index >= rows - own
    old_inputs = jnp.take_along_axis(state.inputs, kept[..., None], axis=1)
    old_documents = jnp.take_along_axis(state.documents, kept, axis=1)
    return ConvState(
        jnp.where(new[..., None], element.inputs, old_inputs), jnp.where(new, element.documents, old_documents)
    )


def _check_padding(documents: Int[Array, "B T"]) -> None:
    padding = documents == 0
    before = lax.cummax(documents, axis=1)
    after = jnp.where(padding, jnp.iinfo(documents.dtype).max, documents)
    inside = padding & (before > 0) & (before == lax.cummin(after, axis=1, reverse=True))
    checkify.check(~jnp.any(inside), "segment_ids has padding inside a document; a layer allows it at its ends only")


class ShortConvolution(nnx.Module):
    """SiLU of a depthwise convolution over the last w tokens of the document."""

    def __init__(self, channels: int, width: int, key: Array, *, check: bool = False) -> None:
        bound = width**-0.5  # by fan-in: a deviation of 0.02 would shrink q, k and v below the norms' epsilon
        self.kernel = nnx.Param(jax.random.uniform(key, (width, channels), jnp.float32, -bound, bound))
        self.reach = width - 1  # earlier tokens that count
        self.check = check

    def __call__(
        self,
        x: Float[Array, "B T E"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: ConvState | None = None,
        *,
        sequence_axis: str | None = None,
    ) -> tuple[Float[Array, "B T E"], ConvState]:
        batch, length, channels = x.shape
        if self.check and segment_ids is not None:
            _check_padding(segment_ids)
        if segment_ids is None:
            document = jnp.ones(batch, jnp.int32) if state is None else jnp.maximum(state.document, 1)
            documents = jnp.broadcast_to(document[:, None], (batch, length))
        else:
            documents = segment_ids.astype(jnp.int32)
        final = None
        if sequence_axis is not None:
            empty = init_state(batch, channels, self.reach + 1, x.dtype)
            element = self._after(x, documents, None)
            state, final = axis_scan(_append, element, empty if state is None else state, sequence_axis)
        several = segment_ids is not None or state is not None
        y = lean(self._answer)(self.kernel[...], x, documents if several else None, state)
        return y, (self._after(x, documents, state) if final is None else final)

    def _lay_down(
        self, x: Array, documents: Int32[Array, "B T"] | None, state: ConvState | None
    ) -> tuple[Float[Array, "B L E"], Int32[Array, "B L"] | None]:
        """(inputs, documents) of the state and the tokens, adjacent, L = T + w - 1."""
        inputs = jnp.pad(x, [(0, 0), (self.reach, 0), (0, 0)])
        owners = None if documents is None else jnp.pad(documents, [(0, 0), (self.reach, 0)])
        if documents is None or state is None:
            return inputs, owners
        first = jnp.argmax(documents > 0, axis=1)  # 0 without any real token: the state then stands in front
        place = jax.vmap(lambda row, new, start: lax.dynamic_update_slice_in_dim(row, new, start, 0))
        return place(inputs, state.inputs, first), place(owners, state.documents, first)

    def _after(self, x: Array, documents: Int32[Array, "B T"], state: ConvState | None) -> ConvState:
        """The state after the tokens."""
        inputs, owners = self._lay_down(x, documents, state)
        last = jnp.max(jnp.where(documents > 0, jnp.arange(1, x.shape[1] + 1), 0), axis=1)
        cut = jax.vmap(lambda row, start: lax.dynamic_slice_in_dim(row, start, self.reach, 0))
        inputs, owners = cut(inputs, last), cut(owners, last)
        return ConvState(jnp.where(owners[..., None] > 0, inputs, 0), owners)  # nothing of what padding held

    def _answer(self, kernel: Array, x: Array, documents: Array | None, state: ConvState | None) -> Array:
        return self._convolve(kernel, *self._lay_down(x, documents, state), x)

    def _convolve(self, kernel: Array, inputs: Array, owners: Array | None, x: Array) -> Array:
        width, length = kernel.shape[0], x.shape[1]
        kernel = made_first(kernel.astype(x.dtype).astype(jnp.float32))
        total = kernel[-1] * x.astype(jnp.float32)
        for step in range(width - 1):
            tap = lax.slice_in_dim(inputs, step, step + length, axis=1).astype(jnp.float32)
            if owners is not None:  # chosen, not multiplied: a NaN of another document stays there
                same = lax.slice_in_dim(owners, step, step + length, axis=1) == owners[:, width - 1 :]
                tap = jnp.where(same[..., None], tap, 0.0)
            total = total + kernel[step] * tap
        return jax.nn.silu(total).astype(x.dtype)


class HeadsConvolution(ShortConvolution):
    """SiLU of a convolution over some tokens of the document, each `dilation` before the next, that mixes the channels of
    a head: E of them, of which F come out."""

    def __init__(
        self, heads: int, inputs: int, outputs: int, width: int, dilation: int, key: Array, *, check: bool = False
    ) -> None:
        deviation = (2 / (width * inputs)) ** 0.5
        self.kernel = nnx.Param(deviation * jax.random.normal(key, (width, heads, inputs, outputs), jnp.float32))
        self.reach = (width - 1) * dilation
        self.dilation = dilation
        self.check = check

    def _convolve(self, kernel: Array, inputs: Array, owners: Array | None, x: Array) -> Float[Array, "B T HF"]:
        kernel = kernel.astype(x.dtype)
        (batch, length), (width, heads) = x.shape[:2], kernel.shape[:2]
        total = jnp.zeros((), jnp.float32)
        for step in range(width):
            at = step * self.dilation
            tap = lax.slice_in_dim(inputs, at, at + length, axis=1) if step < width - 1 else x
            if owners is not None and step < width - 1:
                same = lax.slice_in_dim(owners, at, at + length, axis=1) == owners[:, self.reach :]
                tap = jnp.where(same[..., None], tap, 0)
            tap = tap.reshape(batch, length, heads, -1)
            total = total + jnp.einsum("bthe,hef->bthf", tap, kernel[step], preferred_element_type=jnp.float32)
        return jax.nn.silu(total).astype(x.dtype).reshape(batch, length, -1)
