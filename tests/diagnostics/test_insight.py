"""What the cache kept and where reads look: the numbers shown are those that the model itself computes with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hola_jax import LanguageModel
from hola_jax.diagnostics import insight, memory_insight
from hola_jax.diagnostics.insight import handed
from hola_jax.memory import MemoryConfig, cached_positions, hola_memory
from hola_jax.memory.norms import for_reading
from tests.laws.mixers import small

TOKENS = np.random.default_rng(0).integers(0, 31, 37).astype(np.int32)  # four blocks of 8, and five tokens more
RECENCY = MemoryConfig(window=3, block=8, chunk=4, score="recency", read="unit_l2")
CONFIGS = {"surprise": {}, "recency, unit_l2, one key head": {"memory": RECENCY, "key_heads": 1}}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    """With gates and sinks that are not those of a new model."""
    model = LanguageModel(small("hola", **CONFIGS[request.param]))
    cache = model.blocks.mixer.cache
    for number, param in enumerate([cache.sink_logit, cache.gate_logit]):
        param[...] = jax.random.normal(jax.random.key(number), param[...].shape)
    return model


@pytest.fixture(scope="module")
def found(model):
    return jax.tree.map(np.asarray, insight(model, TOKENS))


@pytest.fixture(scope="module")
def layers(model):
    """(inputs, parameters, output) of the memory of each layer."""
    _, handed_on = jax.jit(lambda tokens: handed(model, tokens))(TOKENS[None])
    return [jax.tree.map(lambda x, n=n: x[n], handed_on) for n in range(2)]


def test_the_forward_pass_and_what_each_block_finds_are_the_models_own(model, found):
    assert found.kept.shape[1] == 5  # before each of four blocks, and after the last
    state = model.init_state(1)
    for block in range(5):
        np.testing.assert_array_equal(found.kept[:, block], cached_positions(state.memory)[:, 0])
        if block < 4:
            piece = slice(8 * block, 8 * block + 8)
            logits, state = model(TOKENS[None, piece], state=state)
            np.testing.assert_allclose(found.logits[piece], logits[0], rtol=1e-4, atol=1e-5)
    assert np.all(found.kept[:, 0] == -1) and np.all(found.kept[:, 1:] >= 0)


def test_a_read_gives_one_together_with_the_sink_and_nothing_to_what_it_cannot_see(model, found, layers):
    for layer, (inputs, params, _) in enumerate(layers):
        reading = for_reading(inputs.q, inputs.k, 2, params, model.config.memory)
        queries, keys = (np.asarray(x[0], np.float64) for x in reading)
        for token, head in [(0, 0), (5, 1), (8, 0), (21, 1), (36, 0)]:
            block = token // 8
            held = found.kept[layer, block, head]
            visible = np.array([*held[held >= 0], *range(8 * block, token + 1)])
            logits = keys[visible, head % keys.shape[1]] @ queries[token, head]
            powers = np.exp(np.append(logits, float(params.sink_logit[head])))
            expected = np.zeros(len(TOKENS))
            expected[visible] = powers[:-1] / powers.sum()
            np.testing.assert_allclose(found.weights[layer, token, head], expected, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found.sink[layer, token, head], powers[-1] / powers.sum(), rtol=1e-3)


def test_weights_and_values_give_what_the_memory_read(model, found, layers):
    @jax.jit
    def answer(inputs, params, gate):
        gates = jnp.full_like(params.gate_logit, gate)
        return hola_memory(*inputs, params._replace(gate_logit=gates), config=model.config.memory)[0][0]

    for layer, (inputs, params, out) in enumerate(layers):
        read = np.einsum("thj,jhv->thv", found.weights[layer], inputs.v[0])
        shut = answer(inputs, params, -jnp.inf)
        np.testing.assert_allclose(read, answer(inputs, params, jnp.inf) - shut, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(shut + found.gate[layer][:, None] * read, out[0], rtol=1e-4, atol=1e-5)


def test_the_surprise_is_that_of_the_specification(model, found, layers):
    whole = dataclasses.replace(model.config.memory, block=40, score="surprise")  # all is still in the running block
    run = jax.jit(lambda inputs, params: hola_memory(*inputs, params, config=whole, implementation="reference")[1])
    for layer, (inputs, params, _) in enumerate(layers):
        scores = run(inputs, params).block_scores
        np.testing.assert_allclose(found.surprise[layer].T, scores[0, :, :37], rtol=1e-4, atol=1e-6)


def test_what_competes_is_the_score_of_the_configuration(model, found):
    if model.config.memory.score == "surprise":
        np.testing.assert_array_equal(found.scores, found.surprise)
    else:
        assert found.kept[:, 4].tolist() == [[[31, 30, 29]] * 2] * 2
        np.testing.assert_array_equal(found.scores[0, :, 0], np.arange(37))


def test_the_memory_alone_can_be_looked_into(model, found, layers):
    for layer, (inputs, params, _) in enumerate(layers):
        alone = memory_insight(*inputs, params, config=model.config.memory)
        np.testing.assert_array_equal(alone.kept, found.kept[layer])
        for name in ("surprise", "scores", "weights", "sink"):
            expected = getattr(found, name)[layer]
            np.testing.assert_allclose(getattr(alone, name), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="v has 2 rows; one can be looked into at a time"):
        memory_insight(*jax.tree.map(lambda x: jnp.concatenate([x, x]), inputs), params, config=model.config.memory)
    rescored = dataclasses.replace(model.config.memory, score="attention")
    with pytest.raises(ValueError, match="cannot be shown: score='attention' is decided anew"):
        memory_insight(*inputs, params, config=rescored)


@pytest.mark.parametrize(
    ("mixer", "tokens", "reason"),
    [
        ("gated_deltanet", TOKENS, "mixer is 'gated_deltanet'; only 'hola' has an exact cache"),
        ("hola", TOKENS[None], r"tokens has shape \(1, 37\); it must be \[T\]"),
        ("hola", TOKENS[:0], r"tokens has shape \(0,\)"),
        (
            "hola by eviction",
            TOKENS,
            "cannot be shown: score='recall' is decided anew at each block's end; it can where",
        ),
        ("hola by learned", TOKENS, "cannot be shown: score='learned' is what a layer gives"),
    ],
)
def test_what_cannot_be_looked_into_is_named(mixer, tokens, reason):
    with pytest.raises(ValueError, match=reason):
        insight(LanguageModel(small(mixer)), tokens)


def test_a_memory_in_which_more_than_a_score_decides_is_not_looked_into():
    model = LanguageModel(small("hola", memory=MemoryConfig(window=3, block=8, chunk=4, same_key=0.9)))
    with pytest.raises(ValueError, match=r"cannot be shown: same_key=0\.9 is decided anew at each block's end"):
        insight(model, TOKENS)
