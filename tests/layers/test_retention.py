"""The net that makes the score "learned": its equations, its parameters, and what it leaves behind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hola_jax import LanguageModel
from hola_jax.config import parameter_count
from hola_jax.layers.retention import Retention
from hola_jax.memory import MemoryConfig, hola_memory
from hola_jax.weights import tables
from tests.laws.cases import PARAMS
from tests.laws.mixers import small
from train.shardings import path_name, spec_of

CONFIG = small("hola by learned", key_heads=1)
SEGMENTS = np.array([[0, 0] + [1] * 6 + [4] * 11, [1] * 15 + [2] * 3 + [0]])


def silu(x):
    return x / (1 + np.exp(-x))


def by_definition(net: Retention, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Of one document and one row: k [T, h, K], v [T, H, V] to logits [T, H]."""
    tokens, heads = v.shape[:2]
    x = np.concatenate([np.repeat(k, heads // k.shape[1], axis=1), v], axis=-1).astype(np.float64)
    for layer in (net.conv0, net.conv1, net.conv2):
        kernel = np.asarray(layer.kernel[...], np.float64)  # [3, H, E, F]
        y = np.zeros((tokens, heads, kernel.shape[-1]))
        for t in range(tokens):
            for step in range(3):
                if (at := t - 2 * (2 - step)) >= 0:
                    y[t] += np.einsum("he,hef->hf", x[at], kernel[step])
        x = silu(y)
    return np.einsum("the,he->th", x, np.asarray(net.weight[...], np.float64)) + np.asarray(net.bias[...])


def test_a_logit_is_made_of_a_token_and_those_before_it_in_its_document():
    net = Retention(CONFIG, jax.random.key(0))
    assert [layer.kernel[...].shape for layer in (net.conv0, net.conv1, net.conv2)] == [
        (3, 2, 16, 8),
        (3, 2, 8, 4),
        (3, 2, 4, 2),
    ]
    draw = np.random.default_rng(0)
    k = draw.normal(size=(2, 19, 1, 8)).astype(np.float32)
    v = draw.normal(size=(2, 19, 2, 8)).astype(np.float32)
    structure, params = nnx.split(net)
    run = jax.jit(lambda k, v, segments: nnx.merge(structure, params)(k, v, segments, None, None)[0])
    got = np.asarray(run(k, v, SEGMENTS))
    for row, segments in enumerate(SEGMENTS):
        for document in set(segments) - {0}:
            own = segments == document
            wanted = by_definition(net, k[row, own], v[row, own])
            np.testing.assert_allclose(got[row, own], wanted, atol=2e-5)
    assert np.ptp(got[SEGMENTS > 0]) > 0.1


def test_training_holds_the_share_of_positive_logits_down():
    """Every read wants all values larger, so every logit is taught to rise; at first all are positive. Where reads teach
    all alike, the push stops them where STRENGTH log(p / rho) is about 1 / p: p = 0.32 for rho = 0.25."""
    structure, params = nnx.split(Retention(CONFIG, jax.random.key(0)))
    memory = MemoryConfig(window=8, block=8, chunk=8, score="learned", sparsity=0.25)
    draw, shape = np.random.default_rng(0), (4, 48, 2)
    q, k = (jnp.asarray(draw.normal(size=(4, 48, 1, 8)), "float32") for _ in range(2))
    v, gates = 1 + jnp.asarray(draw.normal(size=(*shape, 8)), "float32"), jnp.full(shape, 0.5)
    optimizer = optax.adam(0.01)

    def loss(params):
        z, _ = nnx.merge(structure, params)(k, v, None, None, None)
        out, _ = hola_memory(q, k, v, gates, -gates, PARAMS, config=memory, learned=z)
        return jnp.sum((out - 10.0) ** 2), jnp.mean(z > 0, axis=(0, 1))

    def step(carry, _):
        params, moments = carry
        gradient, share = jax.grad(loss, has_aux=True)(params)
        change, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, change), moments), share

    params = nnx.to_pure_dict(params)
    train = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=100)[1])
    shares = np.asarray(train(params))
    assert (shares[0] > 0.9).all()
    np.testing.assert_allclose(shares[-20:].mean(0), 0.32, atol=0.06)


def test_its_parameters_are_counted_and_have_their_place_on_a_mesh():
    model = nnx.eval_shape(lambda: LanguageModel(CONFIG))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    assert sum(x.size for _, x in leaves) == parameter_count(CONFIG)["total"]
    for path, x in leaves:
        assert len(spec_of(path_name(path))) == x.ndim


def test_it_has_no_keys_of_another_library():
    with pytest.raises(NotImplementedError, match="score 'learned' has no Hugging Face keys"):
        tables.rows(CONFIG)
