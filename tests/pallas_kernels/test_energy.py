"""A read that keeps a share of its weights, by kernels: what XLA keeps is kept, and what is dropped stays where it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from hola_jax.memory import MemoryConfig, hola_memory, init_state
from hola_jax.memory.cache_read import least_logit
from pallas_kernels.cache import cached_read
from pallas_kernels.cache.energy import without_dropped, without_dropped_of_one
from tests.laws.cases import CONFIG, KEY_HEADS, PARAMS, B, H, K, V, inputs
from tests.pallas_kernels import test_cache, test_step

ENERGIES = (0.5, 0.9, 1.0)


def logits(kind):
    """[queries, entries]"""
    found = np.random.default_rng(3).normal(size=(8, 40)).astype(np.float32) * 3
    if kind == "ties":
        found = np.round(found)
    if kind == "little is visible":
        found[:, 5:] = -np.inf
        found[0, 1:] = -np.inf
    return found


@functools.cache
def both_ways(energy):
    def run(weights):
        parts = [weights[:, :30], weights[:, 30:39], weights[:, 39:]]
        one = jax.vmap(lambda *parts: without_dropped_of_one([x[None] for x in parts], energy))(*parts)
        return [jnp.concatenate(x, axis=1) for x in (without_dropped(parts, energy), [x[:, 0] for x in one])]

    return jax.jit(run)


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("kind", ["apart", "ties", "little is visible"])
def test_both_ways_without_sorting_keep_what_sorting_keeps(kind, energy):
    """Of what weighs more than 1e-6 of all: less is rounding, where all is to be kept."""
    given = logits(kind)
    least = np.asarray(least_logit(jnp.asarray(given.T), energy))[0]
    weights = np.exp(given - given.max(axis=1, keepdims=True))
    counts = weights > 1e-6 * weights.sum(axis=1, keepdims=True)
    wanted = np.where((given >= least[:, None]) & counts, weights, 0)
    for found in both_ways(energy)(weights):
        np.testing.assert_array_equal(np.where(counts, found, 0), wanted)


@pytest.mark.parametrize("energy", ENERGIES)
def test_the_read_of_a_sequence_is_that_of_xla(energy):
    """Of two documents, from a cache with an empty row; keys come twice, so that logits tie."""
    arrays, cache, documents, start, _ = test_cache.arguments(test_cache.CASES["initial cache of a document that ends"])
    queries, keys, *others = arrays
    arrays = queries, keys.at[:, 1::2].set(keys[:, :-1:2]), *others
    options = {"documents": documents, "start": start, "window": test_cache.W, "block": test_cache.C, "interpret": True}
    run = jax.jit(functools.partial(cached_read, energy=energy, **options))
    wanted, after, _ = jax.jit(functools.partial(test_cache.expected, energy=energy))(*arrays, cache, documents, start)
    out, mine, _ = run(*arrays, cache)
    test_cache.close(out, wanted)
    np.testing.assert_array_equal(mine.positions, after.positions)


def test_a_tile_of_values_is_brought_where_a_weight_is_on_it_and_not_else():
    """On a simulated chip, whose memory starts as NaN. The cache is full, and ten tokens stand in two tiles of the block.
    The next one asks for the first of them, and the cache's values are NaN: to bring them would spoil the answer, and so
    would what the chip holds in their place."""
    config = MemoryConfig(window=16, block=16, chunk=4, read_energy=0.9)
    q, k, *others = inputs(8, 27, key_heads=2)
    arrays = [x[:, :26] for x in (q, k, *others)]
    _, state = jax.jit(functools.partial(hola_memory, config=config))(*arrays, PARAMS)
    memory = test_step.memory_of(state)
    memory = memory._replace(block_keys=memory.block_keys.at[:, :, 0].set(40 * q[:, 26]))
    spoilt = memory._replace(cache_values=jnp.full_like(memory.cache_values, jnp.nan))
    token, documents = [x[:, 26:] for x in (q, k, *others)], jnp.ones(2, jnp.int32)
    out, _ = test_step.kernel(config, pltpu.InterpretParams(uninitialized_memory="nan"))(token, documents, spoilt)
    wanted, _ = test_step.kernel(config)(token, documents, memory)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    assert np.all(np.isnan(test_step.kernel(CONFIG)(token, documents, spoilt)[0]))  # who keeps all brings all


def test_a_gradient_is_refused_when_it_is_traced_but_that_of_one_token_which_is_xlas():
    config = MemoryConfig(window=4, block=8, chunk=4, read_energy=0.9)
    words = "energy=0.9: a read that drops entries has no gradient in a kernel; use the XLA path"

    def gradient(arrays, state=None):
        def loss(arrays):
            return jnp.sum(hola_memory(*arrays, PARAMS, config=config, state=state, implementation="interpret")[0])

        return jax.eval_shape(jax.grad(loss), arrays)

    with pytest.raises(NotImplementedError, match=words):
        gradient(inputs(0, 9))
    read = functools.partial(cached_read, window=4, block=8, energy=0.9, interpret=True)
    with pytest.raises(NotImplementedError, match=words):
        jax.eval_shape(jax.grad(lambda x, *others: jnp.sum(read(x, *others)[0])), *test_cache.case())
    gradient(inputs(0, 1), init_state(config, B, H, K, V, key_heads=KEY_HEADS))
