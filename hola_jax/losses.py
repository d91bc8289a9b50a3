"""What training minimises."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Bool, Float, Int, UInt8


def next_token_loss(
    logits: Float[Array, "B T E"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None
) -> Float[Array, ""]:
    """Mean negative log likelihood of the targets, in nats, over the tokens that `mask` names (None: all)."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    if mask is None:
        return jnp.mean(loss)
    kept = mask.astype(bool)
    return jnp.sum(jnp.where(kept, loss, 0.0)) / jnp.maximum(jnp.sum(kept), 1)


class LossSums(NamedTuple):
    """Of the tokens that the mask counts; `objective / tokens` is what a step minimises."""

    objective: Float[Array, ""]  # negative log likelihood plus the z-loss: the one with a gradient
    nll: Float[Array, ""]
    tokens: Float[Array, ""]


def chunked_loss(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "E D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | UInt8[Array, "B T"],
    *,
    chunk: int = 2048,
    z_loss: float = 0.0,
) -> LossSums:
    """Sums of the loss of `hidden @ kernel.T`, made `chunk` tokens at a time: no [B, T, E] exists, forward or backward.
    Each token counts as often as the mask says.

    The gradient is made together with the loss, chunk by chunk, so no logits are computed twice. z_loss weighs the square
    of the softmax's log sum, which keeps logits near zero.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 token")
    tokens = targets.size
    size = min(chunk, tokens)

    def in_chunks(x: Array) -> Array:
        x = x.reshape(tokens, *x.shape[2:])
        x = jnp.pad(x, [(0, -tokens % size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:])

    counts = mask.astype(jnp.float32)
    objective, nll = _loss(z_loss, in_chunks(hidden), kernel, in_chunks(targets), in_chunks(counts))
    return LossSums(objective, lax.stop_gradient(nll), jnp.sum(counts))


def _chunk_loss(
    z_loss: float, hidden: Float[Array, "c D"], kernel: Float[Array, "E D"], targets: Array, counts: Array
) -> tuple[Array, Array]:
    """(objective, nll) of one chunk."""
    logits = jnp.einsum("cd,ed->ce", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    # By comparison, not by index: the vocabulary may be sharded, and this stays on each device.
    chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[1]) == targets[:, None], logits, 0.0), axis=1)
    log_total = jax.nn.logsumexp(logits, axis=1)
    nll = jnp.sum(jnp.where(counts > 0, counts * (log_total - chosen), 0.0))
    return nll + z_loss * jnp.sum(jnp.where(counts > 0, counts * log_total**2, 0.0)), nll


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(z_loss: float, hidden: Array, kernel: Array, targets: Array, counts: Array) -> tuple[Array, Array]:
    def add(sums: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        hidden, targets, counts = chunk
        objective, nll = _chunk_loss(z_loss, hidden, kernel, targets, counts)
        return (sums[0] + objective, sums[1] + nll), None

    zero = jnp.zeros((), jnp.float32)
    return lax.scan(add, (zero, zero), (hidden, targets, counts))[0]


def _loss_and_gradient(
    z_loss: float, hidden: Array, kernel: Array, targets: Array, counts: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    def add(sums: tuple[Array, Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        hidden, targets, counts = chunk
        loss = lambda hidden, kernel: _chunk_loss(z_loss, hidden, kernel, targets, counts)  # noqa: E731
        objective, pull, nll = jax.vjp(loss, hidden, kernel, has_aux=True)
        d_hidden, d_kernel = pull(jnp.ones((), jnp.float32))
        return (sums[0] + objective, sums[1] + nll, sums[2] + d_kernel), d_hidden

    zero = jnp.zeros((), jnp.float32)
    (objective, nll, d_kernel), d_hidden = lax.scan(
        add, (zero, zero, jnp.zeros_like(kernel)), (hidden, targets, counts)
    )
    return (objective, nll), (d_hidden, d_kernel)


def _scaled_gradient(
    z_loss: float, saved: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    d_hidden, d_kernel = saved
    scale = cotangents[0]
    return (d_hidden * scale).astype(d_hidden.dtype), (d_kernel * scale).astype(d_kernel.dtype), None, None


_loss.defvjp(_loss_and_gradient, _scaled_gradient)
