"""Vital signs: they say of a memory what can be counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hola_jax import LanguageModel
from hola_jax.diagnostics import vital_signs
from hola_jax.memory import MemoryConfig
from tests.laws.mixers import small

TOKENS = np.random.default_rng(0).integers(0, 31, (2, 41)).astype(np.int32)


def signs_of(model):
    """The parameters are given: of constants the compiler would compute everything itself, and slowly."""
    structure, params = nnx.split(model)
    found = jax.jit(lambda params, tokens: vital_signs(nnx.merge(structure, params), tokens))(params, TOKENS)
    return {name: float(x) for name, x in found.items()}


def test_a_new_model_reads_evenly():
    """With queries scaled to nothing, a read is even: the sink has its share of the visible entries."""
    model = LanguageModel(small("hola"))
    model.blocks.mixer.cache.query_scale[...] = jnp.zeros_like(model.blocks.mixer.cache.query_scale[...])
    signs = signs_of(model)
    np.testing.assert_allclose(signs["gate"], 1 / (1 + np.exp(4)), rtol=1e-5)
    np.testing.assert_allclose(signs["null_sink_mass"], 1 / (3 + 1 + 1), rtol=1e-5)  # window, the token, the sink
    assert signs["cache_filled"] == 1 and 0 <= signs["cache_replaced"] <= 1 and 1 <= signs["cached_age"] <= 40


def test_by_recency_every_block_replaces_the_cache():
    memory = MemoryConfig(window=3, block=8, chunk=4, score="recency")
    signs = signs_of(LanguageModel(small("hola", memory=memory)))
    assert signs["cache_replaced"] == 1 and signs["cached_age"] == 2  # the last three tokens of the block: 1, 2 and 3


def test_the_null_sinks_mass_is_not_told_where_scores_weigh_reads():
    memory = MemoryConfig(window=3, block=8, chunk=4, read_power=True)
    signs = jax.eval_shape(lambda: vital_signs(LanguageModel(small("hola", memory=memory)), TOKENS))
    assert set(signs) == {"gate", "cached_age", "cache_filled", "cache_replaced"}


def test_a_row_too_short_has_a_gate_and_another_mixer_none():
    assert set(vital_signs(LanguageModel(small("hola")), TOKENS[:, :16])) == {"gate"}
    with pytest.raises(ValueError, match="mixer is 'gla'"):
        vital_signs(LanguageModel(small("gla")), TOKENS)
