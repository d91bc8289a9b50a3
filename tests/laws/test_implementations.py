"""Law 8: every implementation is the reference, forward and backward, with the same tokens kept.

Compiling is what takes the time. Outputs, state and gradients come from one program (the laws of splits and isolation run
forward alone), and what differs in its numbers alone has the shapes of a variant.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hola_jax.memory import CacheParams, MemoryConfig, hola_memory
from hola_jax.memory.learned import STRENGTH
from tests.laws.cases import (
    CONFIG,
    OTHER,
    PARAMS,
    SEGMENTS,
    VARIANTS,
    T,
    assert_close,
    assert_same_state,
    compiled,
    compiled_gradient,
    inputs,
)

IMPLEMENTATIONS = ["xla", "interpret"]
SLOW = ("recency", "no-cache")
OLDEST = ("surprise", "energy", *OTHER)  # ways of their own; the others say of another jax what these do
BY_XLA = ("energy", *OTHER)  # what no kernel takes, and says so; of "energy", not its gradient: its outputs are below
ONE_DOCUMENT = ("residual-unit_l2",)  # without segment ids
MARKS = {variant: pytest.mark.slow for variant in SLOW} | {variant: pytest.mark.oldest for variant in OLDEST}
CASES = [
    pytest.param(variant, how, marks=MARKS.get(variant, ()))
    for how in IMPLEMENTATIONS
    for variant in VARIANTS
    if how == "xla" or variant not in BY_XLA
]


def compare(config, implementation, arrays, segments, atol=2e-5, grad_atol=1e-4):
    got, (out, state) = compiled_gradient(config, implementation)(arrays, PARAMS, segments)
    wanted, (expected, expected_state) = compiled_gradient(config, "reference")(arrays, PARAMS, segments)
    assert_close(out, expected, atol)
    assert_same_state(state, expected_state, atol)
    names = ["q", "k", "v", "beta", "log_decay", *CacheParams._fields]
    for name, a, b in zip(names, jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.all(np.isfinite(np.asarray(a, np.float32))), name
        assert_close(a, b, grad_atol, f"gradient of {name}")


def compare_forward(config, implementation, arrays, segments=None):
    out, state = compiled(config, implementation)(arrays, segments)
    expected, expected_state = compiled(config, "reference")(arrays, segments)
    assert_close(out, expected)
    assert_same_state(state, expected_state)


@pytest.mark.parametrize(("variant", "implementation"), CASES)
def test_implementation_is_the_reference(variant, implementation):
    if implementation == "interpret" and variant == "no-cache":
        with pytest.raises(NotImplementedError, match="window=0 keeps no cache"):
            compiled(VARIANTS[variant], implementation)(inputs(), None)
        return
    compare(VARIANTS[variant], implementation, inputs(), None if variant in ONE_DOCUMENT else SEGMENTS)


def test_a_share_of_the_read_by_kernels_as_in_the_reference():
    compare_forward(dataclasses.replace(VARIANTS["energy"], fade=None), "interpret", inputs(), SEGMENTS)


@pytest.mark.parametrize(("variant", "implementation"), [case for case in CASES if "no-cache" not in case.values])
def test_no_output_depends_on_a_later_token(variant, implementation):
    """Law 4: the gradient of what is said at one place by all that comes behind is zero, and by what stands there is not.
    That few tokens are to be kept pushes all of a batch, so here nothing is asked of their number."""
    config = dataclasses.replace(VARIANTS[variant], sparsity=None)
    segments = None if variant in ONE_DOCUMENT else SEGMENTS
    for t in (6, 7, 8, 19):  # of row 0 a document: places 5 to 19; of row 1: 0 to 10, and from 11 on
        gradient = compiled_gradient(config, implementation)(inputs(3), PARAMS, segments, at=t)[0][0]
        by_place = sum(np.abs(np.asarray(g)).reshape(*g.shape[:2], -1).sum(-1) for g in gradient)
        assert not np.any(by_place[:, t + 1 :]) and np.all(by_place[:, t] > 0)
        assert by_place[0, t - 1] > 0


@pytest.mark.slow
def test_decay_per_channel_as_in_the_reference():
    """The kernels take one decay per token and head, and say so (tests/memory/test_bad_input.py)."""
    arrays = inputs(4)
    decay = np.random.default_rng(4).exponential(size=(*arrays[4].shape, 8)) ** 3  # from none to overwhelming
    compare(CONFIG, "xla", [*arrays[:4], -jnp.asarray(decay, jnp.float32)], SEGMENTS)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_gates_and_repeated_or_zero_keys_as_in_the_reference(implementation):
    q, k, v, beta, g = inputs(5)
    draw = np.random.default_rng(5)
    k = k.at[:, 5:15].set(k[:, 5:6]).at[:, 20:24].set(0.0)
    beta = jnp.asarray(draw.choice([0.0, 0.5, 1.0], beta.shape), jnp.float32)
    g = jnp.asarray(draw.choice([0.0, -50.0, -1e-3], g.shape), jnp.float32)
    # Exact repeats make exact residuals of zero, whose order is rounding: rank by position, which has none.
    compare(VARIANTS["recency"], implementation, [q, k, v, beta, g], SEGMENTS)


def test_bfloat16_inputs_as_in_the_reference():
    """The kernels are held to the same program: pallas_kernels/test_hola.py."""
    arrays = inputs(6, dtype="bfloat16")
    got, (out, state) = compiled_gradient(CONFIG, "xla")(arrays, PARAMS, SEGMENTS)
    wanted, (expected, expected_state) = compiled_gradient(CONFIG, "reference")(arrays, PARAMS, SEGMENTS)
    assert out.dtype == jnp.bfloat16 and state.cache_keys.dtype == jnp.bfloat16
    assert state.fast_weights.dtype == jnp.float32
    assert_close(out, expected, atol=3e-2)  # one bfloat16 ulp near 4
    assert_same_state(state, expected_state, atol=2e-2)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= 0.03 * np.linalg.norm(b) + 1e-3


@pytest.mark.parametrize(("tokens", "implementation"), [(1, "xla"), (9, "xla"), (9, "interpret")])
def test_any_number_of_tokens(tokens, implementation):
    """Whole blocks, and a token at a time by the kernels: test_splits.py."""
    compare_forward(CONFIG, implementation, inputs(7, tokens))


@pytest.mark.slow
def test_random_scores_as_in_the_reference():
    """Scores have no gradient, so that of the read and the state is the one of "write"."""
    compare_forward(MemoryConfig(window=4, block=8, chunk=2, score="random", seed=7), "xla", inputs(), SEGMENTS)


def test_ties_are_won_by_the_earlier_token():
    q, k, v, beta, g = inputs(8)
    arrays = [q, k, jnp.ones_like(v), jnp.full_like(beta, 0.5), g]
    config = VARIANTS["write"]
    for implementation in ("reference", *IMPLEMENTATIONS):
        _, (_, state) = compiled_gradient(config, implementation)(arrays, PARAMS, np.ones_like(SEGMENTS))
        assert state.cache_positions.tolist() == [[list(range(10))] * 2] * 2
    assert config.window < T // config.block * config.block


@pytest.mark.parametrize("sparsity", [None, 0.2])
def test_a_learned_score_is_taught_by_what_reads_make_of_the_value_and_held_down(sparsity):
    """dL/dr = v . dL/dv, r = sigmoid(z) - 0.5. Nothing is written to S, so v is in the exact reads alone. Where a share of
    positive logits is asked for, those are pushed down besides, and padding is not counted."""
    config = dataclasses.replace(OTHER["learned"], sparsity=sparsity)
    q, k, v, beta, g = inputs(9)
    z, draw = jnp.asarray(np.random.default_rng(9).normal(size=beta.shape), jnp.float32), np.random.default_rng(1)
    weight, segments = draw.normal(size=v.shape), jnp.asarray(SEGMENTS)

    @jax.jit
    def gradients(v, z):
        def loss(v, z):
            given = (q, k, v, jnp.zeros_like(beta), g, PARAMS)
            return jnp.sum(weight * hola_memory(*given, config=config, segment_ids=segments, learned=z)[0])

        return jax.grad(loss, argnums=(0, 1))(v, z)

    d_v, d_z = gradients(v, z)
    r = jax.nn.sigmoid(z)
    taught, real = np.asarray(jnp.sum(v * d_v, axis=-1) * r * (1 - r)), SEGMENTS > 0
    assert np.abs(taught[real]).min() > 0 and not np.any(taught[~real])
    kept = np.asarray(z > 0) & real[..., None]
    push = 0.0
    if config.sparsity is not None:
        too_many = kept[real].mean(0) / config.sparsity
        assert (too_many > 1).all()
        push = STRENGTH * np.log(too_many) * np.abs(taught[real]).mean(0)
    assert_close(d_z, taught + np.where(kept, push, 0.0))


def test_only_positive_logits_are_kept_where_a_share_is_asked_for():
    q, k, v, beta, g = inputs(1)
    sign = jnp.where((jnp.arange(T) == 3) | (jnp.arange(T) == 20), 1.0, -1.0)[:, None, None]
    v = sign * jnp.cos(jnp.arange(v.shape[-1])) * jnp.ones_like(v)  # so are the logits of `cases.learned`
    for implementation in ("reference", "xla"):
        run = compiled_gradient(OTHER["learned"], implementation)
        _, (_, state) = run([q, k, v, beta, g], PARAMS, np.ones_like(SEGMENTS))
        assert state.cache_positions.tolist() == [[[3, 20, -1, -1]] * 2] * 2


@pytest.mark.parametrize("config", [c for c in OTHER.values() if c.score != "surprise"], ids=lambda c: c.score)
def test_ties_are_won_by_the_earlier_token_whatever_the_score(config):
    q, k, v, beta, g = inputs(8)
    arrays = [q, jnp.zeros_like(k), -jnp.ones_like(v), beta, g]  # whose logits are positive in `cases.learned`
    blind = PARAMS._replace(sink_logit=jnp.full(2, 1e4, "float32"))  # all weights are nothing: exp underflows
    for implementation in ("reference", "xla"):
        _, (_, state) = compiled_gradient(config, implementation)(arrays, blind, np.ones_like(SEGMENTS))
        assert state.cache_positions.tolist() == [[list(range(4))] * 2] * 2
