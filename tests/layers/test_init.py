"""Where parameters start, and what that depends on."""

import jax
import jax.numpy as jnp
import numpy as np

from hola_jax.layers import GLA, HOLA, KDA
from hola_jax.layers.init import log_uniform_rate, named_key, step_bias
from tests.laws.mixers import small

KEY = jax.random.key(3)


def test_a_key_depends_on_the_name_and_on_nothing_else() -> None:
    assert jnp.array_equal(jax.random.key_data(named_key(KEY, "q")), jax.random.key_data(named_key(KEY, "q")))
    assert not jnp.array_equal(jax.random.key_data(named_key(KEY, "q")), jax.random.key_data(named_key(KEY, "k")))


def test_a_gate_less_layer_draws_the_same_numbers() -> None:
    with_gate, without = (HOLA(small("hola", output_gate=gate), KEY) for gate in (True, False))
    for name in ("query", "value", "output"):
        np.testing.assert_array_equal(getattr(with_gate, name).kernel[...], getattr(without, name).kernel[...])
    assert without.gate is None


def test_decays_start_in_their_ranges() -> None:
    rate = np.exp(jax.jit(lambda key: log_uniform_rate(key, 4096, 0.0))(KEY))
    assert 0 < rate.min() < 0.1 and 15.9 < rate.max() < 16
    assert np.exp(jax.jit(lambda key: log_uniform_rate(key, 4096, 1.0))(KEY)).min() >= 1 - 1e-6
    step = jax.nn.softplus(jax.jit(lambda key: step_bias(key, 4096))(KEY))
    assert 0.99e-3 < step.min() < 1.1e-3 and 0.09 < step.max() < 0.101
    assert abs(jnp.median(step) - 1e-2) < 1e-3  # log-uniform: half of it below the geometric mean


def test_hola_starts_close_to_gated_deltanet() -> None:
    cache = HOLA(small("hola"), KEY).cache.params()
    assert (cache.gate_logit == -4).all() and (cache.sink_logit == 0).all()
    assert (cache.query_scale == 1).all() and (cache.key_scale == 1).all() and cache.temperature is None


def test_projections_start_small_and_biases_at_zero() -> None:
    layer = GLA(small("gla", dim=256, heads=4, key_dim=64, value_dim=64), KEY)
    assert abs(jnp.std(layer.query.kernel[...]) - 0.02) < 2e-4
    assert (layer.decay.up.bias[...] == 0).all()
    layer = KDA(small("kda"), KEY)
    assert layer.decay.dt_bias.shape == (16,) and layer.decay.A_log.shape == (2,)
