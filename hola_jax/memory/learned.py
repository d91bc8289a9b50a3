"""The score that is learned (LTE): what the read of a token's value says of having kept it.

A layer gives each token a logit z, and r = sigmoid(z) - 0.5 is how much it is to be kept. The cache keeps the W largest, so
which tokens those are has no gradient; r learns from the straight-through one: as if reads saw v in proportion to r,

    dL/dr = v . dL/dv,    dL/dv as the exact reads give it, from the cache and from the running block.

LTE keeps what has r > 0 and holds their number down by a penalty. Here W is that number, in training as in decoding, so
the penalty has nothing to do and only the order of the logits counts (choice).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hola_jax.array_types import Array, Float


@jax.custom_vjp
def retained(v: Float[Array, "... V"], logit: Float[Array, "..."]) -> Float[Array, "... V"]:
    """v, whose gradient reaches the logit too."""
    return v


def _forward(v: Array, logit: Array) -> tuple[Array, tuple[Array, Array]]:
    return v, (v, logit)


def _backward(saved: tuple[Array, Array], d_v: Array) -> tuple[Array, Array]:
    v, logit = saved
    d_r = jnp.sum(v.astype(jnp.float32) * d_v.astype(jnp.float32), axis=-1)
    r = jax.nn.sigmoid(logit.astype(jnp.float32))
    return d_v, (d_r * r * (1 - r)).astype(logit.dtype)


retained.defvjp(_forward, _backward)
