"""The score that is learned (LTE): what the read of a token's value says of having kept it.

A layer gives each token a logit z, and r = sigmoid(z) - 0.5 is how much it is to be kept. The cache keeps the W largest, so
which tokens those are has no gradient; r learns from the straight-through one: as if reads saw v in proportion to r,

    dL/dr = v . dL/dv,    dL/dv as the exact reads give it, from the cache and from the running block.

LTE keeps what has r > 0 and holds their number down by a penalty lambda mean(max(r, 0)); a controller outside the gradient
multiplies lambda from step to step while a head keeps too many, and divides it while it keeps too few. Here are two ways:

    sparsity=None   W is that number, in training as in decoding: the penalty has nothing to do and only the order of the
                    logits counts (choice)
    sparsity=rho    only z > 0 competes, and each head's logits get, beside what reads teach,

                        dL/dz_t += [z_t > 0] STRENGTH log(max(1, p / rho)) m

                    where p is the share of the head's tokens with z > 0, and m the mean of |dL/dz| that reads teach them

The push is made anew from each batch, so a step carries nothing to the next (choice: LTE's trainer carries lambda). In units
of m it fits any loss, summed over tokens or averaged, early in training or late. It grows with the logarithm of how many
times too many are kept, as lambda does, and is nothing at the target or below. Were each logit free, a token would stay if
its reads asked for more than the push; no more than 1 / a of all can ask for a times the mean, so learning rests where
STRENGTH p log(p / rho) <= 1. p and m are of the real tokens of a call: of one microbatch, of a device's rows and of
its part of a sequence.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from hola_jax.array_types import Array, Bool, Float

STRENGTH = 10.0  # of the push in units of what reads teach, where e times too many are kept (choice)


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


def competing(logit: Float[Array, "..."], sparsity: float | None) -> Float[Array, "..."]:
    """What a token competes with: its logit, or nothing where it is to be positive and is not."""
    return logit if sparsity is None else jnp.where(logit > 0, logit, -jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def held_down(sparsity: float, logit: Float[Array, "B T H"], real: Bool[Array, "B T"]) -> Float[Array, "B T H"]:
    """The logits, whose gradient pushes those that are positive down while their share of the `real` tokens is above
    `sparsity`."""
    return logit


def _held_forward(sparsity: float, logit: Array, real: Array) -> tuple[Array, tuple[Array, Array]]:
    return logit, (logit, real)


def _held_backward(sparsity: float, saved: tuple[Array, Array], d_logit: Array) -> tuple[Array, None]:
    logit, real = saved
    kept, count = (logit > 0) & real[..., None], jnp.maximum(jnp.sum(real), 1)
    share = jnp.sum(kept, axis=(0, 1)) / count
    taught = jnp.sum(jnp.abs(d_logit.astype(jnp.float32)) * real[..., None], axis=(0, 1)) / count
    push = STRENGTH * jnp.log(jnp.maximum(share / sparsity, 1.0)) * taught
    return d_logit + jnp.where(kept, push, 0.0).astype(d_logit.dtype), None


held_down.defvjp(_held_forward, _held_backward)
