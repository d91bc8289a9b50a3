"""Spikes, sinks and amplifiers: what is reported is what a few lines of NumPy find in the model's own activations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hola_jax import LanguageModel
from hola_jax.diagnostics import depth_report, depth_signs, insight
from hola_jax.diagnostics.depth import amplifier_eigenvalue, amplifier_norms, spikes_of
from hola_jax.layers.attention import rotate
from hola_jax.memory import MemoryConfig
from tests.laws.mixers import small

TOKENS = np.random.default_rng(0).integers(0, 31, (2, 13)).astype(np.int32)


def test_a_spike_is_found_where_it_stands():
    x = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    x[1, 3, 2], x[0, 4, 6], x[1, 1, 0] = -2000.0, 150.0, 30.0
    found = spikes_of(jnp.asarray(x))
    assert (found.largest, found.row, found.token, found.channel) == (2000.0, 1, 3, 2)
    np.testing.assert_array_equal(found.channels, [2, 6, 0])
    np.testing.assert_array_equal(found.tops, [2000.0, 150.0, 30.0])
    np.testing.assert_allclose(found.median, np.median(np.abs(x)), rtol=1e-6)
    assert found.massive == 1 and found.ratio == found.largest / found.median  # 150 is not 1000 medians


def test_amplifiers_are_those_of_the_matrices_that_are_not_made():
    draw = np.random.default_rng(0)
    gate, up, down = draw.normal(size=(6, 10)), draw.normal(size=(6, 10)), draw.normal(size=(10, 6))
    u = np.einsum("ik,ai,bi->kab", down, gate, up)
    norms = amplifier_norms(*(jnp.asarray(x, jnp.float32) for x in (gate, up, down)))
    np.testing.assert_allclose(norms, np.linalg.norm(u, axis=(1, 2)), rtol=1e-5)
    for k in range(3):
        values = np.linalg.eigvalsh((u[k] + u[k].T) / 2)
        found = amplifier_eigenvalue(*(jnp.asarray(x, jnp.float32) for x in (gate, up, down[:, k])))
        np.testing.assert_allclose(found, values[np.abs(values).argmax()], rtol=1e-3)


@pytest.fixture(scope="module")
def transformer() -> Any:
    """A model that spikes, its report, and what its sub-layers read and answer by a loop over layers."""
    model = LanguageModel(small("transformer", key_heads=1))
    down = model.blocks.mlp.down.kernel
    down[...] = down[...].at[0, :, 5].multiply(3e5)  # layer 0's MLP amplifies channel 5
    for kernel in (model.blocks.mixer.query.kernel, model.blocks.mixer.key.kernel):
        kernel[...] = 20 * kernel[...]  # reads that choose
    structure, params = nnx.split(model.blocks)

    @jax.jit
    def loop(params: Any, x: Any) -> Any:
        reads, answers, keys = [], [], []
        for layer in range(2):
            block = nnx.merge(structure, jax.tree.map(lambda p, layer=layer: p[layer], params))
            normed = block.mixer_norm(x)
            keys.append((block.mixer.query(normed), block.mixer.key(normed)))
            y = block.mixer(normed)[0]
            reads, answers, x = [*reads, x], [*answers, y], x + y
            y = block.mlp(block.mlp_norm(x))
            reads, answers, x = [*reads, x], [*answers, y], x + y
        return [*reads, x], answers, keys

    found = loop(nnx.to_pure_dict(params), model.embedding[...][TOKENS])
    return model, depth_report(model, TOKENS), jax.tree.map(np.asarray, found)


def test_depths_are_what_sublayers_read_and_answer(transformer):
    _, report, (reads, answers, _) = transformer
    for spikes, expected in ((report.reads, reads), (report.answers, answers)):
        np.testing.assert_allclose(spikes.largest, [np.abs(x).max() for x in expected], rtol=1e-5)
        np.testing.assert_allclose(spikes.median, [np.median(np.abs(x)) for x in expected], rtol=1e-4)
    for d, x in enumerate(reads):
        place = np.unravel_index(np.abs(x).argmax(), x.shape)
        assert (report.reads.row[d], report.reads.token[d], report.reads.channel[d]) == place
    assert report.step_up == 1 and report.reads.channel[2] == 5 and report.reads.massive[2] > 0
    assert report.amplifier_channel[0] == 5 and np.abs(report.amplifier_eigenvalue[0]) <= report.amplifier_norms[0, 5]


def test_spike_tokens_come_to_point_the_same_way(transformer):
    _, report, (reads, _, _) = transformer
    sizes = np.abs(reads[2]).max(-1).ravel()
    chosen = [n for n in np.argsort(-sizes)[:8] if sizes[n] >= sizes.max() / 2]
    for d, x in enumerate(reads):
        unit = x.reshape(-1, 32)[chosen]
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        pairs = ~np.eye(len(chosen), dtype=bool)
        np.testing.assert_allclose(report.cosine[d], (unit @ unit.T)[pairs].mean(), atol=1e-4)


def test_attention_received_is_the_mean_over_later_queries(transformer):
    model, report, (_, _, keys) = transformer
    places = jnp.broadcast_to(jnp.arange(13), (2, 13))
    for layer, parts in enumerate(keys):
        q, k = (np.asarray(rotate(jnp.asarray(x.reshape(2, 13, -1, 8)), places, 1e4), np.float64) for x in parts)
        alpha = np.zeros((2, 13))  # by head and key
        for row, head, t in np.ndindex(2, 2, 13):
            powers = np.exp(k[row, : t + 1, 0] @ q[row, t, head] / np.sqrt(8))
            alpha[head, : t + 1] += powers / powers.sum() / 2
        alpha /= 13 - np.arange(13)
        np.testing.assert_allclose(report.masses.received[layer], alpha, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(report.masses.first_token[layer], alpha[:, 0], rtol=1e-3, atol=1e-5)
    share = np.mean(np.asarray(report.masses.first_token) > 0.3)
    assert report.masses.sink_ratio == share
    structure, params = nnx.split(model)
    signs = jax.jit(lambda params: depth_signs(nnx.merge(structure, params), TOKENS))(params)
    np.testing.assert_allclose(signs["largest_after.0.mlp"], report.reads.largest[2], rtol=1e-6)
    np.testing.assert_allclose(signs["first_token.1"], np.mean(report.masses.first_token[1]), rtol=1e-5)
    assert signs["sink_ratio"] == share and len(signs) == 2 * 4 + 2 + 1
    text = report.table()
    assert len(text.splitlines()) == 1 + 5 + 1 + 2 + 1 and " up" in text and "the last norm" in text


def test_masses_of_hola_are_those_of_its_reads():
    model = LanguageModel(small("hola", residual="attention"))
    sink = model.blocks.mixer.cache.sink_logit
    sink[...] = jax.random.normal(jax.random.key(0), sink[...].shape)
    masses = depth_report(model, TOKENS).masses
    texts = [insight(model, row) for row in TOKENS]
    weights = np.stack([text.weights for text in texts])  # [row N T H T]
    block = np.arange(13) // 8
    running = block[:, None, None] == block
    for found, expected in (
        (masses.block, np.where(running, weights, 0).sum(-1)),
        (masses.cache, np.where(running, 0, weights).sum(-1)),
        (masses.null_sink, 1 - weights.sum(-1)),
    ):
        np.testing.assert_allclose(found, expected.mean(axis=(0, 2)), atol=1e-5)
    alpha = weights.mean(0).sum(axis=1) / (13 - np.arange(13))  # [N H T]
    np.testing.assert_allclose(masses.received, alpha, atol=1e-5)


@pytest.mark.parametrize("memory", [{"score": "learned"}, {"score": "attention"}, {"budget": 4}], ids=str)
def test_spikes_are_told_where_it_cannot_be_told_what_is_read(memory):
    model = LanguageModel(small("hola", memory=MemoryConfig(window=3, block=8, chunk=4, **memory)))
    signs = jax.eval_shape(lambda: depth_signs(model, TOKENS))
    assert len(signs) == 2 * 4 and all("_after." in name for name in signs)


def test_what_cannot_be_reported_is_named():
    with pytest.raises(ValueError, match=r"tokens has shape \(13,\); it must be \[B T\]"):
        depth_report(LanguageModel(small("gla")), TOKENS[0])
