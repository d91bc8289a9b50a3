"""The language model over any mixer: scan, states, remat, marks, and what it refuses."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify

import hola_jax
from hola_jax import LanguageModel, MemoryConfig, ModelConfig, functional
from hola_jax.losses import next_token_loss
from hola_jax.model import weight_decay_mask
from tests.laws.mixers import MIXERS, TOKENS, small

IDS = np.asarray(jax.random.randint(jax.random.key(0), (2, TOKENS), 0, 31), np.int32)


@functools.cache
def built(mixer: str, **fields: Any) -> tuple[LanguageModel, Any, Any]:
    model = LanguageModel(small(mixer, **fields), seed=1)
    return model, *functional(model)


@functools.cache
def loss_and_gradient(mixer: str, remat: str) -> Any:
    _, forward, params = built(mixer, remat=remat)
    loss = lambda params: next_token_loss(forward(params, IDS)[0][:, :-1], IDS[:, 1:])  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(params)


def test_a_call_continues_what_another_left() -> None:
    model = LanguageModel(small("hola"))
    logits, state = model(IDS)
    more, state = model(IDS[:, :1], state=state)
    assert logits.shape == (2, TOKENS, 31) and logits.dtype == jnp.float32
    whole, _ = model(np.concatenate([IDS, IDS[:, :1]], axis=1))
    np.testing.assert_allclose(more[:, 0], whole[:, -1], atol=1e-5)


def test_the_scan_over_layers_is_a_loop_over_layers() -> None:
    model, forward, params = built("gated_deltanet")
    graph = nnx.graphdef(model.blocks)

    @jax.jit
    def loop(params: Any) -> jax.Array:
        x = params["embedding"][IDS]
        for layer in range(2):
            x = nnx.merge(graph, jax.tree.map(lambda p, layer=layer: p[layer], params["blocks"]))(x)[0]
        return nnx.merge(nnx.graphdef(model.norm), params["norm"])(x) @ params["embedding"].T

    np.testing.assert_allclose(jax.jit(forward)(params, IDS)[0], loop(params), atol=2e-6)
    assert not np.allclose(*params["blocks"]["mixer"]["query"]["kernel"])  # layers start differently


def test_names_are_stable() -> None:
    _, _, params = built("hola")
    assert params["blocks"]["mixer"]["query"]["kernel"].shape == (2, 32, 16)
    assert params["embedding"].shape == (31, 32)
    mixer = {"query", "key", "value", "query_conv", "key_conv", "value_conv", "beta", "decay", "gate", "norm", "output"}
    assert set(params["blocks"]["mixer"]) == mixer | {"cache"}
    assert set(params["blocks"]) == {"mixer_norm", "mixer", "mlp_norm", "mlp"}


def test_weight_decay_spares_norms_gates_decays_and_biases() -> None:
    for mixer in ("hola", "kda"):
        model, _, params = built(mixer)
        mask = weight_decay_mask(model)
        assert jax.tree.structure(mask) == jax.tree.structure(params)
        spared = {
            jax.tree_util.keystr(path[-1:], simple=True)
            for path, decayed in jax.tree.leaves_with_path(mask)
            if not decayed
        }
        cache = {"query_scale", "key_scale", "sink_logit", "gate_logit"}
        assert spared == {"scale", "A_log", "dt_bias"} | (cache if mixer == "hola" else {"bias"})


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(remat: str) -> None:
    loss, gradient = loss_and_gradient("hola", "none")
    again, other = loss_and_gradient("hola", remat)
    np.testing.assert_allclose(loss, again, rtol=1e-6)
    for path, g in jax.tree.leaves_with_path(gradient):
        assert np.abs(g).max() > 0, jax.tree_util.keystr(path)  # every parameter learns
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, other)


@pytest.mark.parametrize("mixer", MIXERS)
def test_bfloat16_runs_and_keeps_the_types_of_the_state(mixer: str) -> None:
    model, forward, params = built(mixer, dtype="bfloat16")
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    state = model.init_state(2)
    logits, after = jax.jit(forward)(params, IDS, None, state)
    assert np.isfinite(logits).all() and logits.dtype == jnp.float32
    sizes = [[(x.shape, x.dtype) for x in jax.tree.leaves(s)] for s in (state, after)]
    assert sizes[0] == sizes[1]


def test_padding_anywhere_is_nothing() -> None:
    """Inside a document too, where a layer alone would not allow it."""
    _, forward, params = built("hola")
    run = jax.jit(forward)
    ids = np.array([[1] * 9 + [0] * 4, [1] * 4 + [2] * 5 + [0] * 4], np.int32)
    order = np.array([0, 9, 10, 1, 2, 11, 3, 4, 5, 12, 6, 7, 8])
    tidy, _ = run(params, IDS, ids)
    mixed, _ = run(params, IDS[:, order], ids[:, order])
    real = ids[:, order] > 0
    np.testing.assert_array_equal(np.asarray(mixed)[real], np.asarray(tidy)[:, order][real])


def test_an_unknown_token_is_seen_in_its_document_only() -> None:
    _, forward, params = built("hola")
    segments = np.array([[1] * 6 + [2] * 7] * 2, np.int32)
    tokens = IDS.copy()
    tokens[0, 3] = 31
    logits, _ = jax.jit(forward)(params, tokens, segments)
    assert np.isnan(logits[0, 3:6]).all() and np.isfinite(logits[0, 6:]).all() and np.isfinite(logits[1]).all()


def test_values_are_checked_where_asked_for() -> None:
    model, forward, params = built("gsa", check=True)
    backwards = np.array([[2] * 6 + [1] * 7] * 2, np.int32)
    model(IDS)
    with pytest.raises(checkify.JaxRuntimeError, match="decreases"):
        model(IDS, backwards)
    with pytest.raises(checkify.JaxRuntimeError, match="decreases"):
        jax.jit(checkify.checkify(forward))(params, IDS, backwards)[0].throw()


def test_hidden_and_head_are_the_two_halves() -> None:
    model = LanguageModel(small("gsa", tie_embeddings=False))
    halves = jax.jit(lambda tokens: model.head(model.hidden(tokens)[0]))(IDS)
    np.testing.assert_allclose(halves, model(IDS)[0], atol=1e-6)


def test_loss_of_a_flat_guess_is_the_logarithm_of_the_vocabulary() -> None:
    logits, mask = jnp.zeros((2, 3, 31)), jnp.array([[1, 1, 0]] * 2)
    assert abs(next_token_loss(logits, jnp.ones((2, 3), int)) - np.log(31)) < 1e-6
    spoilt = logits.at[:, 2].set(jnp.nan)  # what the mask leaves out does not matter
    assert abs(next_token_loss(spoilt, jnp.ones((2, 3), int), mask) - np.log(31)) < 1e-6


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda model: model(IDS.astype(np.float32)), TypeError, "tokens is float32"),
        (lambda model: model(IDS[0]), ValueError, r"tokens has shape \(13,\)"),
        (lambda model: model(IDS, IDS[:, :3]), ValueError, "segment_ids has shape"),
        (lambda model: model(IDS[:1], state=model.init_state(2)), ValueError, "1 rows of tokens"),
        (lambda model: model(IDS, state=built("gla")[0].init_state(2)), ValueError, "not that of mixer 'hola'"),
        (lambda model: model.init_state(0), ValueError, "batch is 0"),
        (lambda model: LanguageModel("hola-340m"), TypeError, "hola_jax.preset"),
        (lambda model: ModelConfig(dim=32, layers=1, heads=2, mixer="holo"), ValueError, "did you mean 'hola'"),
        (lambda model: ModelConfig(dim=32, layers=1, heads=2, remat="ful"), ValueError, "did you mean 'full'"),
        (lambda model: ModelConfig(dim=32, layers=1, heads=2, dtype="float16"), ValueError, "bfloat16, float32"),
        (lambda model: ModelConfig(dim=32, layers=1, heads=3), ValueError, "no multiple of 3"),
        (lambda model: ModelConfig(dim=32, layers=1, heads=4, key_heads=3), ValueError, "does not divide heads=4"),
        (lambda model: ModelConfig(dim=32, layers=0, heads=4), ValueError, "layers is 0"),
        (lambda model: ModelConfig(dim=32, layers=1, heads=4, memory=64), TypeError, "must be a MemoryConfig"),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(built("hola")[0])


def test_a_state_of_another_memory_is_refused() -> None:
    model = built("hola")[0]
    other = dataclasses.replace(model.config, memory=MemoryConfig(window=3, block=8, chunk=4, score="recency"))
    with pytest.raises(ValueError, match="not that of mixer"):
        model(IDS, state=hola_jax.model.init_state(other, 2))
