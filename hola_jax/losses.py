"""What training minimises."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hola_jax.array_types import Array, Bool, Float, Int


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
