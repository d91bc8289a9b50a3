"""Laws 2, 3 and 5: documents, padding, the limits W = 0 and C >= T; and NaN stays in its document."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hola_jax.memory import CacheParams, MemoryConfig, linear_memory
from hola_jax.memory.delta_rule import delta_rule
from hola_jax.memory.norms import rms_norm, unit_l2
from tests.laws.cases import (
    CONFIG,
    FEW,
    PARAMS,
    SEGMENTS,
    B,
    H,
    K,
    T,
    assert_close,
    assert_same_state,
    compiled,
    inputs,
)

SHUT = PARAMS._replace(gate_logit=jnp.full(H, -jnp.inf, "float32"))
# Plain XLA, and the kernels' programs; and what takes another path to its scores.
IMPLEMENTATIONS = ["xla", "interpret"]
WAYS = {name: (CONFIG, name) for name in IMPLEMENTATIONS} | {name: (c, "xla") for name, c in FEW.items()}


@pytest.mark.parametrize("way", WAYS)
def test_changing_one_document_leaves_the_others_bit_identical(way):
    arrays, other = inputs(0), inputs(1)
    changed = [
        jnp.where((SEGMENTS == 2).reshape(B, T, *[1] * (x.ndim - 2)), y, x) for x, y in zip(arrays, other, strict=True)
    ]
    first, second = (np.asarray(compiled(*WAYS[way])(a, SEGMENTS)[0]) for a in (arrays, changed))
    np.testing.assert_array_equal(first[SEGMENTS != 2], second[SEGMENTS != 2])
    assert np.all(first[SEGMENTS == 2] != second[SEGMENTS == 2])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 5), (3, 2)])  # one program for all
def test_a_padded_row_gives_what_the_row_gives_alone(left, right, way):
    arrays = inputs(2)
    segments = np.zeros((B, T), np.int32)
    segments[:, left : T - right] = 1
    noise = [jnp.where((segments == 0).reshape(B, T, *[1] * (x.ndim - 2)), 1e3, x) for x in arrays]
    padded, state = compiled(*WAYS[way])(noise, segments)
    alone, alone_state = compiled(WAYS[way][0])([x[:, left : T - right] for x in arrays])
    assert_close(padded[:, left : T - right], alone)
    assert not np.any(np.asarray(padded)[segments == 0])
    assert_same_state(state, alone_state)


def test_without_cache_and_gate_the_memory_is_gated_deltanet():
    arrays = inputs(4)
    config = MemoryConfig(window=0, block=8, chunk=4)
    out, _ = compiled(config)(arrays, None, None, SHUT)

    @jax.jit
    def state_path(q, k, v, beta, g):
        return delta_rule(unit_l2(q), unit_l2(k), v, beta, g, scale=K**-0.5, chunk=4).out

    alone = state_path(*arrays)
    assert_close(out, alone, atol=2e-7)  # the same sums; two programs may fuse a multiply and an add differently


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_with_a_shut_gate_the_memory_is_gated_deltanet(implementation):
    arrays = inputs(4)
    out, state = compiled(CONFIG, implementation)(arrays, None, None, SHUT)
    alone, after = jax.jit(lambda *arrays: linear_memory(*arrays, scale=K**-0.5, chunk=4))(*arrays)
    assert_close(out, alone, atol=5e-6)
    assert_close(state.fast_weights, after.fast_weights, atol=5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_block_for_all_is_softmax_attention_with_a_sink(implementation):
    arrays = inputs(5)
    config = MemoryConfig(window=4, block=40, chunk=8)
    with_read, _ = compiled(config, implementation)(arrays)
    without, _ = compiled(config, implementation)(arrays, None, None, SHUT)

    @jax.jit
    def attention(q, k, v):
        q, k = rms_norm(q, PARAMS.query_scale), rms_norm(k, PARAMS.key_scale)
        logits = jnp.einsum("btk,bsk->bts", q[:, :, 0], k[:, :, 0])[:, None] / K**0.5
        logits = jnp.where(jnp.tri(T, dtype=bool), logits, -jnp.inf)
        sink = jnp.broadcast_to(PARAMS.sink_logit[:, None, None], (B, H, T, 1))
        weights = jax.nn.softmax(jnp.concatenate([jnp.broadcast_to(logits, (B, H, T, T)), sink], -1), -1)[..., :-1]
        return jnp.einsum("bhts,bshv->bthv", weights, v) * jax.nn.sigmoid(PARAMS.gate_logit)[:, None]

    assert_close(np.asarray(with_read) - np.asarray(without), attention(*arrays[:3]), atol=5e-6)


@pytest.mark.parametrize(
    ("which", "way"),
    [
        pytest.param(which, way, id=f"{name}-{way}", marks=pytest.mark.oldest if (name, way) == ("k", "xla") else ())
        for which, name in enumerate(["q", "k", "v", "beta", "log_decay"])
        for way in WAYS
    ],
)
def test_nan_reaches_its_own_document_and_no_other(which, way):
    arrays, run = inputs(6), compiled(*WAYS[way])
    clean = np.asarray(run(arrays, SEGMENTS)[0])
    bad = list(arrays)
    bad[which] = bad[which].at[0, 22, 0].set(jnp.nan)  # document 2 of row 0
    out, state = run(bad, SEGMENTS)
    out = np.asarray(out)
    outside = np.ones((B, T), bool)
    outside[0, 22:] = False
    np.testing.assert_array_equal(out[outside], clean[outside])
    assert np.all(np.isnan(out[0, 22]).any(-1).any(-1))
    if which:  # a query writes nothing
        assert np.isnan(out[0, 22:]).any(-1).any(-1).all() and np.isnan(state.fast_weights[0]).any()
        more = inputs(7, 13)  # as many as the laws of splits have programs for
        again, _ = run(more, np.array([[2] * 13, [3] * 13], np.int32), state)
        assert np.isnan(again[0]).any() and not np.isnan(again[1]).any()
        after, _ = run(more, np.full((B, 13), 9, np.int32), state)
        assert np.all(np.isfinite(after))


@pytest.mark.parametrize("way", WAYS)
def test_nan_in_padding_is_not_seen(way):
    arrays = inputs(8)
    clean = np.asarray(compiled(*WAYS[way])(arrays, SEGMENTS)[0])
    bad = [x.at[0, :5].set(jnp.nan) for x in arrays]
    np.testing.assert_array_equal(compiled(*WAYS[way])(bad, SEGMENTS)[0], clean)


def test_parameters_that_the_read_does_not_use_may_be_absent():
    config = MemoryConfig(window=4, block=8, chunk=4, read="unit_l2")
    lean = CacheParams(None, None, PARAMS.sink_logit, PARAMS.gate_logit, PARAMS.temperature)
    np.testing.assert_array_equal(compiled(config)(inputs(), None, None, lean)[0], compiled(config)(inputs())[0])
