"""The inverse of I + L for strictly lower triangular L, by block doubling.

L is nilpotent, so a power series would end, but its terms overflow when |L| > 1; doubling forms no powers. Small blocks
are inverted by substitution written out over scalars with the batch on the vector lanes; pairs of inverted blocks are
then joined by two matrix products, X_21 = -X_22 L_21 X_11, until one block is left.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Float

LEAF = 8  # rows of a block that is inverted by substitution


def _invert_leaf(lower: Float[Array, "b b m"]) -> Float[Array, "b b m"]:
    size = lower.shape[0]
    rows: list[list[Array]] = []
    for i in range(size):
        row = []
        for k in range(i):
            entry = lower[i, k]
            for j in range(k + 1, i):
                entry = entry + lower[i, j] * rows[j][k]
            row.append(-entry)
        rows.append(row)
    zero, one = jnp.zeros_like(lower[0, 0]), jnp.ones_like(lower[0, 0])
    return jnp.stack([jnp.stack([*row, one, *[zero] * (size - 1 - len(row))]) for row in rows])


@jax.custom_vjp
def unit_lower_inverse(lower: Float[Array, "... c c"]) -> Float[Array, "... c c"]:
    """(I + lower)^-1; entries of `lower` on and above its diagonal must be zero. Any c."""
    length = lower.shape[-1]
    size = LEAF
    while size < length:
        size *= 2
    batch = lower.shape[:-2]
    padded = jnp.pad(lower.reshape(-1, length, length), [(0, 0), (0, size - length), (0, size - length)])
    count, blocks = padded.shape[0], size // LEAF

    leaves = jnp.stack([padded[:, i : i + LEAF, i : i + LEAF] for i in range(0, size, LEAF)], axis=1)
    leaves = _invert_leaf(leaves.reshape(count * blocks, LEAF, LEAF).transpose(1, 2, 0))
    inverse = leaves.transpose(2, 0, 1).reshape(count, blocks, LEAF, LEAF)
    width = LEAF
    while width < size:
        below = [padded[:, i + width : i + 2 * width, i : i + width] for i in range(0, size, 2 * width)]
        first, second = inverse[:, 0::2], inverse[:, 1::2]
        product = jnp.matmul(second, jnp.stack(below, axis=1), precision=lax.Precision.HIGHEST)
        joint = -jnp.matmul(product, first, precision=lax.Precision.HIGHEST)
        top = jnp.concatenate([first, jnp.zeros_like(joint)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([joint, second], axis=-1)], axis=-2)
        width *= 2
    return inverse[:, 0, :length, :length].reshape(*batch, length, length)


def _inverse_forward(lower: Array) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(lower)
    return inverse, inverse


def _inverse_backward(inverse: Array, cotangent: Array) -> tuple[Array]:
    transposed = jnp.swapaxes(inverse, -1, -2)
    gradient = jnp.matmul(jnp.matmul(transposed, cotangent, precision="highest"), transposed, precision="highest")
    return (-jnp.tril(gradient, -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)
