"""Norms as they are configured: what each is, and that a model with any of them is one model however it is run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hola_jax import LanguageModel, ModelConfig, functional
from hola_jax.config import parameter_count
from hola_jax.layers.attention import rotate
from hola_jax.layers.norm import DynamicTanh
from hola_jax.model import Block, weight_decay_mask
from tests.laws.mixers import small

IDS = np.asarray(jax.random.randint(jax.random.key(0), (2, 6), 0, 31), np.int32)
X = np.random.default_rng(0).normal(size=(2, 6, 32)).astype(np.float32)
LEVERS = [("gla", {"norm": "sandwich"}), ("gla", {"norm": "dynamic_tanh"})]
LEVERS += [("transformer", {"qk_norm": "heads"}), ("transformer", {"qk_norm": "input", "norm": "sandwich"})]


def normed(x: Any) -> Any:
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def block_of(mixer: str, **fields: Any) -> Block:
    return Block(small(mixer, **fields), jax.random.key(0))


def test_dynamic_tanh_is_its_equation() -> None:
    norm = DynamicTanh(32)
    norm.scale[...], norm.shift[...] = jnp.asarray(X[0, 0]), jnp.asarray(X[0, 1])
    np.testing.assert_allclose(norm(X), X[0, 0] * np.tanh(0.5 * X) + X[0, 1], atol=1e-6)
    assert isinstance(block_of("gla", norm="dynamic_tanh").mlp_norm, DynamicTanh)


def test_a_sandwich_norms_what_sublayers_answer() -> None:
    block = block_of("gla", norm="sandwich")
    x = X + normed(block.mixer(normed(X))[0])
    np.testing.assert_allclose(block(X)[0], x + normed(block.mlp(normed(x))), atol=1e-5)


@pytest.mark.parametrize("kind", ["heads", "input"])
def test_queries_and_keys_are_normed_as_configured(kind: str) -> None:
    block = block_of("transformer", qk_norm=kind)
    mixer, x = block.mixer, normed(X)
    places = jnp.broadcast_to(jnp.arange(6), (2, 6))
    q, k = (part(x).reshape(2, 6, 2, 8) for part in (mixer.query, mixer.key))
    if kind == "heads":
        q, k = normed(q), normed(k)
    v = mixer.value(X if kind == "input" else x).reshape(2, 6, 2, 8)
    logits = jnp.einsum("bthk,bshk->bhts", rotate(q, places, 1e4), rotate(k, places, 1e4)) / np.sqrt(8)
    share = jax.nn.softmax(jnp.where(np.tril(np.ones((6, 6), bool)), logits, -jnp.inf))
    expected = mixer.output(jnp.einsum("bhts,bshk->bthk", share, v).reshape(2, 6, 16))
    np.testing.assert_allclose(block.mix(X, None, None, None)[0], expected, atol=1e-6)


@pytest.mark.parametrize(("mixer", "fields"), LEVERS)
def test_parameters_are_counted_and_norms_spared_by_weight_decay(mixer: str, fields: dict[str, str]) -> None:
    model = nnx.eval_shape(lambda: LanguageModel(small(mixer, **fields)))
    params = nnx.to_pure_dict(nnx.state(model))
    assert sum(p.size for p in jax.tree.leaves(params)) == parameter_count(model.config)["total"]
    names = {
        jax.tree_util.keystr(path[-1:], simple=True)
        for path, decayed in jax.tree.leaves_with_path(weight_decay_mask(model))
        if not decayed
    }
    assert names >= ({"alpha", "scale", "shift"} if fields.get("norm") == "dynamic_tanh" else {"scale"})


def test_whole_and_split_are_one_with_normed_queries_and_keys() -> None:
    forward, params = functional(LanguageModel(small("transformer", qk_norm="input", norm="sandwich")))
    run = jax.jit(forward)
    whole, _ = run(params, IDS)
    _, state = run(params, IDS[:, :5])
    np.testing.assert_allclose(run(params, IDS[:, 5:], None, state)[0][:, 0], whole[:, 5], atol=2e-5)


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'sandwich'"):
        ModelConfig(dim=32, layers=1, heads=2, norm="sandwhich")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="qk_norm='heads' is of mixer 'transformer', and mixer is 'hola'"):
        ModelConfig(dim=32, layers=1, heads=2, qk_norm="heads")
