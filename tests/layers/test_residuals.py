"""Attention Residuals: the equations as a plain loop in float64, and a model that obeys them however it is run."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from hola_jax import LanguageModel, ModelConfig, functional
from hola_jax.config import parameter_count
from hola_jax.layers.depth_reads import look
from hola_jax.layers.residuals import MIXER, MLP, Read, attend_over_depth
from hola_jax.losses import next_token_loss
from hola_jax.model import weight_decay_mask
from tests.laws.mixers import small

FULL: dict[str, Any] = {"residual": "attention"}
RULES: dict[str, dict[str, Any]] = {
    "full": FULL,
    "two blocks": {"residual": "block_attention", "residual_blocks": 2},
    "a block a layer": {"residual": "block_attention", "residual_blocks": 4},
}
IDS = np.asarray(jax.random.randint(jax.random.key(0), (2, 12), 0, 31), np.int32)  # a block of memory and a half
EPSILON = 1e-6


def read(query: np.ndarray, scale: np.ndarray, sources: list[np.ndarray]) -> np.ndarray:
    """sum_i alpha_i v_i, alpha = softmax over i of w' RMSNorm(v_i), of one token."""
    logits = np.array([query @ (scale * v / np.sqrt(np.mean(v**2) + EPSILON)) for v in sources])
    alpha = np.exp(logits - logits.max())
    return sum(a * v for a, v in zip(alpha / alpha.sum(), sources, strict=True))


def by_the_equations(p: dict[str, np.ndarray], blocks: int | None) -> np.ndarray:
    """What the last reader finds. A sub-layer is tanh(W h) here; queries, scales and matrices are [2 N, ..]."""
    rows, tokens, _ = p["x"].shape
    sublayers, found = len(p["matrix"]), np.empty_like(p["x"])
    for row, token in np.ndindex(rows, tokens):
        done, partial = [p["x"][row, token]], None  # b_0, or v_0, is the embedding
        for number in range(sublayers):
            if blocks is not None and partial is not None and number % (sublayers // blocks) == 0:
                done, partial = [*done, partial], None
            sources = done if partial is None else [*done, partial]
            y = np.tanh(p["matrix"][number] @ read(p["query"][number], p["scale"][number], sources))
            if blocks is None:
                done = [*done, y]
            else:
                partial = y if partial is None else partial + y
        sources = done if partial is None else [*done, partial]
        found[row, token] = read(p["last_query"], p["last_scale"], sources)
    return found


def by_the_scan(p: dict[str, jax.Array], config: ModelConfig) -> jax.Array:
    last = Read(config)
    last.query[...], last.scale[...] = p["last_query"], p["last_scale"]
    halves = {name: p[name].reshape(config.layers, 2, *p[name].shape[1:]) for name in ("query", "scale", "matrix")}
    layers: dict[str, Any] = {
        name: {"query": halves["query"][:, part], "scale": halves["scale"][:, part]}
        for part, name in enumerate(("mixer_read", "mlp_read"))
    }
    layers["matrix"] = halves["matrix"]

    def layer(x: Any, given: Any) -> tuple[Any, None]:
        (params, rule), _ = given
        for part in (MIXER, MLP):
            x = rule.add(x, jnp.tanh(rule.read(x, part) @ params["matrix"][part].T), part)
        return x, None

    return attend_over_depth(config, layer, functools.partial(lax.scan, layer), p["x"], layers, None, last)[0]


CASES = [(rule, tokens, way) for rule in RULES for tokens, way in ((3, "xla"), (3, "interpret"))]
CASES += [("two blocks", 1, "xla")]  # one token goes its own way


@pytest.mark.parametrize(("rule", "tokens", "way"), CASES)
def test_the_scan_is_the_equations_forward_and_backward(rule: str, tokens: int, way: Any) -> None:
    config = ModelConfig(dim=8, layers=4, heads=2, implementation=way, **RULES[rule])
    draw = np.random.default_rng(0)
    shapes = {"x": (2, tokens, 8), "query": (8, 8), "scale": (8, 8), "matrix": (8, 8, 8)}
    shapes |= {"last_query": (8,), "last_scale": (8,)}
    p = {name: draw.normal(size=shape) / 2 for name, shape in shapes.items()}
    blocks = None if rule == "full" else config.residual_blocks
    weights = draw.normal(size=p["x"].shape)
    single = {name: jnp.asarray(x, jnp.float32) for name, x in p.items()}

    @jax.jit
    def run(p: dict[str, jax.Array]) -> Any:
        gradient, out = jax.grad(lambda p: (jnp.sum((o := by_the_scan(p, config)) * weights), o), has_aux=True)(p)
        return out, gradient

    out, gradient = run(single)
    np.testing.assert_allclose(out, by_the_equations(p, blocks), atol=5e-6)
    for name, x in p.items():
        way, step = draw.normal(size=x.shape), 1e-5
        ends = [np.sum(by_the_equations(p | {name: x + sign * step * way}, blocks) * weights) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient[name] * way), slope, rtol=2e-4, atol=2e-5, err_msg=name)


def test_a_new_model_reads_means() -> None:
    """With zero queries the full rule gives each sub-layer the mean of the embedding and all earlier outputs."""
    model = LanguageModel(small("gated_deltanet", **FULL))
    x = model.embedding[...][IDS]
    structure, params = nnx.split(model.blocks)

    @jax.jit
    def means(params: Any, x: jax.Array) -> jax.Array:
        sources = [x]
        for layer in range(2):
            block = nnx.merge(structure, jax.tree.map(lambda p, layer=layer: p[layer], params))
            sources.append(block.mix(sum(sources) / len(sources), None, None, None)[0])
            sources.append(block.feed(sum(sources) / len(sources)))
        return model.norm(sum(sources) / len(sources))

    np.testing.assert_allclose(jax.jit(lambda: model.hidden(IDS)[0])(), means(nnx.to_pure_dict(params), x), atol=2e-6)


@functools.cache
def built(mixer: str, rule: str, **fields: Any) -> tuple[LanguageModel, Any, Any]:
    """With queries and scales that are not those of a new model."""
    model = LanguageModel(small(mixer, layers=4, **RULES[rule], **fields), seed=1)
    reads = [model.read, model.blocks.mixer_read, model.blocks.mlp_read]
    for number, param in enumerate(param for part in reads for param in (part.query, part.scale)):
        param[...] = jax.random.normal(jax.random.key(number), param[...].shape)
    forward, params = functional(model)
    return model, jax.jit(forward), params


@pytest.mark.parametrize(("mixer", "rule"), [("hola", "full"), ("transformer", "two blocks")])
def test_whole_split_and_token_by_token_are_one(mixer: str, rule: str) -> None:
    model, run, params = built(mixer, rule)
    empty = model.init_state(2)
    whole, _ = run(params, IDS, None, empty)
    first, state = run(params, IDS[:, :6], None, empty)
    second, _ = run(params, IDS[:, 6:], None, state)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=2e-5)
    state, found = empty, []
    for t in range(12):
        logits, state = run(params, IDS[:, t : t + 1], None, state)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=2e-5)
    assert jax.tree.structure(state) == jax.tree.structure(empty)  # depth adds nothing to it


def test_decoding_by_kernels_has_the_rule_around_it() -> None:
    model, plain, params = built("hola", "full")
    run = built("hola", "full", implementation="interpret")[1]
    _, state = plain(params, IDS[:, :6], None, model.init_state(2))
    logits, _ = run(params, IDS[:, 6:7], None, state)
    expected, _ = plain(params, IDS[:, 6:7], None, state)
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_remat_changes_no_gradient_and_every_parameter_learns() -> None:
    def gradient(remat: str) -> Any:
        _, forward, params = built("gla", "two blocks", remat=remat)
        loss = lambda params: next_token_loss(forward(params, IDS)[0][:, :-1], IDS[:, 1:])  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    kept, again = gradient("none"), gradient("full")
    for path, g in jax.tree.leaves_with_path(kept):
        learns = np.abs(g).max(axis=tuple(range(1, g.ndim)))  # layer by layer
        first = "mixer_read" in jax.tree_util.keystr(path)  # the first reader sees one source: nothing to choose
        assert (learns[1:] > 0).all() if first else (learns > 0).any(), jax.tree_util.keystr(path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kept, again)


def test_readers_are_counted_and_spared_by_weight_decay() -> None:
    for rule in RULES:
        model, _, params = built("gla", rule)
        assert sum(p.size for p in jax.tree.leaves(params)) == parameter_count(model.config)["total"]
        mask = weight_decay_mask(model)
        spared = [mask["read"], mask["blocks"]["mixer_read"], mask["blocks"]["mlp_read"]]
        assert not any(jax.tree.leaves(spared))
    assert params["blocks"]["mlp_read"]["query"].shape == (4, 32)
    plain = dataclasses.replace(model.config, residual="plain", residual_blocks=None)
    assert parameter_count(model.config)["total"] - parameter_count(plain)["total"] == 9 * 2 * 32


def test_reads_are_in_float32_though_activations_are_not() -> None:
    """Of bfloat16 sources whose differences are in their last digits: the logits are exact, and what is found is rounded
    once."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(1 + draw.normal(size=(5, 1, 2, 256)) / 100, jnp.bfloat16)
    way = jnp.asarray(draw.normal(size=(1, 256)), jnp.float32)
    part = look(way, x, EPSILON, 4)[0]
    for token in range(2):
        sources = list(np.asarray(x[:4, 0, token], np.float64))
        logits = [way[0] @ (v / np.sqrt(np.mean(v**2) + EPSILON)) for v in sources]
        np.testing.assert_allclose(part.top[0, token], max(logits), atol=3e-5)
        found = np.asarray(part.total[0, token], np.float64) / np.float64(part.mass[0, token])
        expected = read(np.asarray(way[0]), np.ones(256), sources)
        np.testing.assert_allclose(found, expected, rtol=2.0**-8)  # half of a last digit of bfloat16
    model = LanguageModel(small("gla", dtype="bfloat16", **FULL))
    assert jax.eval_shape(lambda: model.hidden(IDS)[0]).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"residual": "atention"}, "did you mean 'attention'"),
        ({"residual_blocks": 2}, r"residual_blocks=2 is of residual='block_attention', and residual is 'plain'"),
        ({"residual": "block_attention", "residual_blocks": 3}, "residual_blocks=3 does not divide layers=4"),
        ({"residual": "block_attention", "residual_blocks": 0}, "residual_blocks is 0"),
    ],
)
def test_what_cannot_be_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small("gla", layers=4, **fields)
