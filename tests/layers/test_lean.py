"""What the backward pass keeps of cheap functions: their arguments, in the type they have, and the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hola_jax.layers.conv import ShortConvolution
from hola_jax.layers.lean import lean
from hola_jax.layers.norm import GatedNorm, RMSNorm

X, GATE = jax.random.normal(jax.random.key(0), (2, 2, 64, 4, 16), jnp.bfloat16)
TOKENS = X.reshape(2, 64, 64)
CONVOLUTION = ShortConvolution(64, 4, jax.random.key(1))
CASES = {
    "norm": (RMSNorm(16, 1e-6), (X,), 1),
    "gated norm": (GatedNorm(16, 1e-6), (X, GATE), 2),
    # The tokens and the document of each; what is laid down behind a state is made again.
    "convolution": (lambda x: CONVOLUTION(x, jnp.ones((2, 64), jnp.int32))[0], (TOKENS,), 2.2),
}


@pytest.mark.parametrize("name", CASES)
def test_little_more_than_the_arguments_is_kept(name):
    call, given, times = CASES[name]
    kept = jax.eval_shape(lambda *given: jax.vjp(call, *given)[1], *given)
    small = 4096  # scales and kernels
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) <= times * X.nbytes + small


def test_gradients_are_those_of_the_function_itself_and_an_argument_may_be_missing_or_whole_numbers():
    def work(x, y, nothing, which):
        return jnp.where(which > 0, jax.nn.silu(x) * y, jnp.sin(x))

    x, y, which = X.astype(jnp.float32), GATE.astype(jnp.float32), jnp.arange(16) % 2

    def total(call):
        return lambda x, y: jnp.sum(jnp.cos(call(x, y, None, which)))

    for found, expected in zip(*(jax.grad(total(call), (0, 1))(x, y) for call in (lean(work), work)), strict=True):
        np.testing.assert_array_equal(found, expected)
