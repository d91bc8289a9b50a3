"""Cumulative-energy filtering: a read that keeps the fewest entries whose softmax weights reach a share."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from hola_jax.diagnostics import Insight, entries_kept, tiles_kept
from hola_jax.memory import MemoryConfig, init_state
from hola_jax.memory.cache_read import least_logit
from tests.laws.cases import CONFIG, KEY_HEADS, SEGMENTS, B, H, K, T, V, assert_close, compiled, inputs, run_in_pieces


def energy(share, **fields):
    return dataclasses.replace(CONFIG, read_energy=share, **fields)


def fewest(weights: np.ndarray, share: float) -> set[int]:
    """By definition: the largest first, until they reach the share."""
    kept, total = set(), 0.0
    for index in np.argsort(-weights):
        if total >= share:
            break
        kept.add(int(index))
        total += weights[index]
    return kept


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 1.0])
def test_a_read_keeps_the_fewest_entries_that_reach_the_share(share):
    logits = np.random.default_rng(0).normal(size=(3, 12, 5)).astype(np.float32) * 2
    logits[:, 9:] = -np.inf
    least = np.asarray(least_logit(jnp.asarray(logits), share))
    for row in range(3):
        for query in range(5):
            weights = np.exp(logits[row, :, query].astype(np.float64))
            wanted = fewest(weights / weights.sum(), share if share < 1 else 1 - 1e-9)
            kept = np.flatnonzero((logits[row, :, query] >= least[row, 0, query]) & np.isfinite(logits[row, :, query]))
            assert set(kept.tolist()) == wanted


def test_all_of_the_share_is_the_plain_read():
    arrays = inputs()
    for implementation in ("xla", "reference"):
        out, state = compiled(energy(1.0), implementation)(arrays, SEGMENTS)
        plain, plain_state = compiled(CONFIG, implementation)(arrays, SEGMENTS)
        assert_close(out, plain, atol=1e-6)
        np.testing.assert_array_equal(state.cache_positions, plain_state.cache_positions)


def test_decoding_drops_what_prefill_drops():
    config, arrays = energy(0.7), inputs(1)
    whole, _ = compiled(config)(arrays, SEGMENTS)
    empty = init_state(config, B, H, K, V, key_heads=KEY_HEADS)
    steps, _ = run_in_pieces(compiled(config), arrays, SEGMENTS, list(range(1, T)), empty)
    assert_close(steps, whole)
    assert np.abs(np.asarray(whole) - np.asarray(compiled(CONFIG)(arrays, SEGMENTS)[0])).max() > 1e-2


def test_fewer_entries_are_kept_of_a_smaller_share():
    weights = np.random.default_rng(2).dirichlet(np.full(9, 0.5), size=(2, 6, 3))  # [N T H, eight tokens and the sink]
    found = Insight(*[None] * 4, weights[..., :8], None)
    shares = [entries_kept(found, share) for share in (0.2, 0.6, 0.9, 1.0)]
    assert shares[0].shape == (2, 3)
    for less, more in itertools.pairwise(shares):
        assert np.all(less < more)
    by_hand = np.mean([len(fewest(row, 0.6)) / 9 for row in weights[1, :, 2]])
    np.testing.assert_allclose(shares[1][1, 2], by_hand)
    with pytest.raises(ValueError, match="energy is 0"):
        entries_kept(found, 0)


def test_a_tile_is_kept_where_any_of_its_rows_is_or_the_token_itself():
    """Four tokens, two to a block and a tile; the second block finds token 0 in the first row of its cache."""
    weights = np.zeros((1, 4, 1, 4), np.float32)
    weights[0, [0, 1, 2, 3], 0, [0, 0, 2, 0]] = 0.9  # ... and the rest on the null sink
    kept = np.array([[-1, -1], [0, -1], [0, 1]])[None, :, None]
    found = Insight(None, None, None, kept, weights, None)
    for queries, wanted in ((1, np.mean([0.5, 0.5, 0.5, 1])), (2, np.mean([0.5, 1]))):
        np.testing.assert_allclose(tiles_kept(found, 0.5, block=2, tile=2, queries=queries), [[wanted]])
    np.testing.assert_allclose(tiles_kept(found, 0.5, block=2, tile=1), [[np.mean([1, 2, 1, 2]) / 4]])
    with pytest.raises(ValueError, match="tile is 3; it must divide the block of 2"):
        tiles_kept(found, 0.5, block=2, tile=3)


@pytest.mark.parametrize("share", [0.0, 1.5, -1])
def test_no_share_is_refused(share):
    with pytest.raises(ValueError, match="it must be None or a share in"):
        MemoryConfig(read_energy=share)
