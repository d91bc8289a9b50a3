"""The parts of the fast path by themselves: the inverse, the decays, the scan, the read, and how exact the whole is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hola_jax.memory.cache_read import query_tiles
from hola_jax.memory.decay import decayed_products, decays, pair_decay, running_sum
from hola_jax.memory.delta_rule import delta_rule
from hola_jax.memory.exact_cache import best_rows, hashed_score
from hola_jax.memory.norms import unit_l2
from hola_jax.memory.scan import prefix_scan
from hola_jax.memory.triangular import unit_lower_inverse


@pytest.mark.parametrize("size", [1, 5, 16, 64])
@pytest.mark.parametrize("scale", [0.2, 1.5])
def test_inverse_of_a_unit_triangle(size, scale):
    lower = np.tril(np.random.default_rng(0).normal(size=(3, size, size)) * scale, -1).astype(np.float32)
    lower = (
        lower / np.maximum(1, np.abs(lower).sum(-1, keepdims=True)) * scale
    )  # rows that sum to more than 1 still fit
    exact = np.linalg.inv(np.eye(size) + lower.astype(np.float64))
    error = np.linalg.norm(jax.jit(unit_lower_inverse)(lower) - exact) / np.linalg.norm(exact)
    assert error < 1e-6


@pytest.mark.parametrize("strong", [-1.0, -30.0, -1e4, -np.inf])
def test_differences_of_running_sums_keep_their_digits(strong):
    draw = np.random.default_rng(1)
    g = -draw.exponential(0.1, size=(64, 1))
    g[draw.uniform(size=g.shape) < 0.5] = strong
    g = g.astype(np.float32)
    mask = np.tri(64, dtype=bool)
    found = np.asarray(jax.jit(lambda g: pair_decay(running_sum(g, None), jnp.asarray(mask)))(g), np.float64)
    finite = np.maximum(g.astype(np.float64), -1e4)[:, 0]
    difference = np.where(mask, np.cumsum(finite)[:, None] - np.cumsum(finite)[None], -np.inf)
    exact = np.exp(difference)
    # Half an ulp of the exponent and one of exp: relative to |x| there, since exp(x (1 + u)) is about exp(x) (1 + x u).
    allowed = 1.2e-7 * exact * (1 + np.abs(np.where(mask, difference, 0))) + 1e-37
    assert np.all(np.abs(found - exact) <= allowed)


def test_decays_per_channel_neither_overflow_nor_lose_their_gradient():
    draw = np.random.default_rng(2)
    x, y = (jnp.asarray(draw.normal(size=(40, 4)), jnp.float32) for _ in range(2))
    g = jnp.asarray(-(draw.exponential(size=(40, 4)) ** 4), jnp.float32)

    def total(x, y, g):
        decay = decays(g, None)
        return jnp.sum(jnp.sin(decayed_products(x, y, decay.total, decay.causal)))

    def plain(x, y, g):
        sums = jnp.cumsum(g, axis=0)
        difference = jnp.where(jnp.tri(40, dtype=bool)[..., None], sums[:, None] - sums[None], -jnp.inf)
        return jnp.sum(jnp.sin(jnp.einsum("ik,jk,ijk->ij", x, y, jnp.exp(difference))))

    for a, b in zip(*(jax.jit(jax.grad(f, argnums=(0, 1, 2)))(x, y, g) for f in (total, plain)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_both_ways_to_scan_agree_on_any_monoid():
    """Here: strings of a free monoid, coded as (base ** length, value); not commutative."""
    elements = (jnp.array([3, 3, 9, 3]), jnp.array([1, 2, 5, 0]))
    act = lambda e, s: e[0] * s + e[1]  # noqa: E731
    combine = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
    runs = {how: prefix_scan(act, combine, elements, jnp.array(7), how) for how in ("sequential", "associative")}
    for before, final in runs.values():
        assert before.tolist() == [7, 22, 68, 617] and final == 1851


def test_best_rows_prefers_the_first_of_equals_and_fills_up():
    scores, places = best_rows(jnp.array([[[1.0, 3.0, 3.0, 2.0]]]), jnp.array([[[10, 11, 12, 13]]]), 6)
    assert places[0, 0, :4].tolist() == [11, 12, 13, 10]
    assert scores[0, 0, 4:].tolist() == [-jnp.inf, -jnp.inf]


def test_random_score_depends_on_position_head_and_seed_alone():
    positions = jnp.arange(4096)
    score = np.asarray(hashed_score(positions, 2, 0))
    np.testing.assert_array_equal(score[100:], hashed_score(positions[100:], 2, 0))
    assert abs(score.mean() - 0.5) < 0.02 and abs(np.corrcoef(score.T)[0, 1]) < 0.05
    assert not np.any(score == np.asarray(hashed_score(positions, 2, 1)))


@pytest.mark.parametrize("block", [1, 6, 7, 256])
def test_tiles_cover_a_block(block):
    assert [i for rows in query_tiles(block) for i in range(block)[rows]] == list(range(block))


@pytest.mark.parametrize(("kind", "bound"), [("ordinary", 4e-7), ("parallel keys", 2e-6), ("closed gates", 2e-6)])
def test_error_against_float64(kind, bound):
    """The bounds that `python benchmarks/cpu.py --errors` shows at full size."""
    draw = np.random.default_rng(3)
    q, k, v = (draw.normal(size=(1, 512, 2, 64)).astype(np.float32) for _ in range(3))
    beta, g = draw.uniform(size=(2, 1, 512, 2)).astype(np.float32)
    g = -0.1 * g
    if kind == "parallel keys":
        k, beta = (1 + 0.05 * k).astype(np.float32), np.full_like(beta, 0.98)
    if kind == "closed gates":
        g = np.where(draw.uniform(size=g.shape) < 0.5, np.float32(-30), g)
    run = jax.jit(lambda q, k, *rest: delta_rule(unit_l2(q), unit_l2(k), *rest, scale=0.125, chunk=64).out)
    found = np.asarray(run(q, k, v, beta, g), np.float64)[0]
    q, k, v, beta, g = (x.astype(np.float64)[0] for x in (q, k, v, beta, g))
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    state, exact = np.zeros((2, 64, 64)), np.empty_like(v)
    for t in range(512):
        state = state * np.exp(g[t])[:, None, None]
        error = v[t] - np.einsum("hk,hkv->hv", k[t], state)
        state = state + np.einsum("h,hk,hv->hkv", beta[t], k[t], error)
        exact[t] = 0.125 * np.einsum("hk,hkv->hv", q[t], state)
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < bound
