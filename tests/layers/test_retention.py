"""The net that makes the score "learned": its equations, its parameters, and what it leaves behind."""

import jax
import numpy as np
import pytest
from flax import nnx

from hola_jax import LanguageModel
from hola_jax.config import parameter_count
from hola_jax.layers.retention import Retention
from hola_jax.weights import tables
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


def test_its_parameters_are_counted_and_have_their_place_on_a_mesh():
    model = nnx.eval_shape(lambda: LanguageModel(CONFIG))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    assert sum(x.size for _, x in leaves) == parameter_count(CONFIG)["total"]
    for path, x in leaves:
        assert len(spec_of(path_name(path))) == x.ndim


def test_it_has_no_keys_of_another_library():
    with pytest.raises(NotImplementedError, match="score 'learned' has no Hugging Face keys"):
        tables.rows(CONFIG)
