"""The chunked loss: it is the plain loss, and its logits are never whole."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hola_jax.losses import chunked_loss, next_token_loss

B, T, D, E = 3, 7, 8, 50
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(B, T, D)).astype(np.float32)
KERNEL = RNG.normal(size=(E, D)).astype(np.float32)
TARGETS = RNG.integers(0, E, (B, T)).astype(np.int32)
MASK = RNG.random((B, T)) < 0.7


def plain(hidden, kernel, z_loss=0.0):
    logits = hidden @ kernel.T
    squares = jnp.sum(jnp.where(MASK, jax.nn.logsumexp(logits, axis=-1) ** 2, 0))
    return next_token_loss(logits, TARGETS, MASK) * MASK.sum() + z_loss * squares


@pytest.mark.parametrize("chunk", [1, 4, 7, 21, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_any_chunk_gives_the_plain_loss_and_its_gradient(chunk, z_loss):
    def chunked(hidden, kernel):
        return chunked_loss(hidden, kernel, TARGETS, MASK, chunk=chunk, z_loss=z_loss).objective * 0.5

    got = jax.jit(jax.value_and_grad(chunked, (0, 1)))(HIDDEN, KERNEL)
    wanted = jax.value_and_grad(lambda *x: 0.5 * plain(*x, z_loss), (0, 1))(HIDDEN, KERNEL)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, wanted)


def test_the_sums_are_of_what_the_mask_names():
    sums = chunked_loss(HIDDEN, KERNEL, TARGETS, MASK, chunk=4, z_loss=0.3)
    assert sums.tokens == MASK.sum()
    np.testing.assert_allclose(sums.nll, plain(HIDDEN, KERNEL), rtol=1e-5)
    assert sums.objective > sums.nll


def test_bfloat16_hidden_states_accumulate_in_float32():
    hidden = jnp.asarray(HIDDEN, jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda h, k: chunked_loss(h, k, TARGETS, MASK, chunk=4).objective, (0, 1)))
    d_hidden, d_kernel = gradient(hidden, KERNEL)
    wanted = jax.grad(plain, 1)(HIDDEN, KERNEL)
    assert d_hidden.dtype == jnp.bfloat16 and d_kernel.dtype == jnp.float32
    np.testing.assert_allclose(d_kernel, wanted, atol=0.1)


def test_no_buffer_holds_the_logits_of_all_tokens():
    rows, tokens, width, vocabulary, chunk = 4, 512, 16, 3000, 64
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, tokens, width), (vocabulary, width))]
    integers = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)

    def chunked(hidden, kernel, targets):
        return chunked_loss(hidden, kernel, targets, targets > 0, chunk=chunk).objective

    compiled = jax.jit(jax.value_and_grad(chunked, (0, 1))).lower(*shapes, integers).compile()
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\[([\d,]+)\]", compiled.as_text())]
    assert max(sizes) <= chunk * vocabulary < rows * tokens * vocabulary
    assert compiled.memory_analysis().temp_size_in_bytes < rows * tokens * vocabulary * 4 / 4


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk is 0"):
        chunked_loss(HIDDEN, KERNEL, TARGETS, MASK, chunk=0)
