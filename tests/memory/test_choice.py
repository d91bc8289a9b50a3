"""What may stand between a score and a row of the cache: each by itself, on numbers that a reader can check."""

import jax.numpy as jnp
import numpy as np
import pytest

from hola_jax.memory import MemoryConfig
from hola_jax.memory.choice import superseded, weighed, within_budget
from hola_jax.memory.reference import _without_superseded

NONE = -np.inf


def test_a_score_that_fades_is_overtaken_when_it_is_older_by_the_logarithm_of_the_ratio():
    config = MemoryConfig(fade=10.0)
    older, younger = weighed(config, jnp.array([[8.0], [1.0]]), jnp.array([100, 121]))[:, 0]
    assert younger > older  # 21 > 10 ln 8 = 20.8
    older, younger = weighed(config, jnp.array([[8.0], [1.0]]), jnp.array([10**6, 10**6 + 20]))[:, 0]
    assert older > younger  # wherever they stand: a float32 holds a hundredth of a token still
    assert np.isfinite(weighed(config, jnp.zeros((1, 1)), jnp.array([0]))).all()


def test_the_later_pair_of_a_key_takes_the_place_and_the_larger_score():
    keys = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.1], [-1.0, 0.0]])[None, None]
    positions = jnp.array([[[7, 3, 9, 11]]])
    found = superseded(jnp.array([[[5.0, 1.0, 2.0, 4.0]]]), positions, keys, 0.9)
    np.testing.assert_array_equal(found, [[[NONE, 1.0, 5.0, 4.0]]])  # an opposite key is another key
    of_empty = superseded(jnp.array([[[NONE, 1.0, 2.0, NONE]]]), positions, keys, 0.9)
    np.testing.assert_array_equal(of_empty, [[[NONE, 1.0, 2.0, NONE]]])


def test_a_key_of_zeros_is_like_none():
    keys, positions = jnp.zeros((3, 2)).at[1, 0].set(1.0), jnp.array([0, 1, 2])
    scores = jnp.array([3.0, 2.0, 1.0])
    np.testing.assert_array_equal(
        superseded(scores[None, None], positions[None, None], keys[None, None], 0.5)[0, 0], scores
    )
    np.testing.assert_array_equal(_without_superseded(scores, positions, keys, 0.5), scores)


def test_heads_share_a_budget_and_the_earlier_token_then_the_earlier_head_wins_a_tie():
    scores = jnp.array([[[9.0, 5.0, 5.0], [7.0, 5.0, NONE]]])
    positions = jnp.array([[[1, 4, 6], [2, 4, -1]]])
    kept = {budget: np.isfinite(within_budget(scores, positions, budget)[0]).tolist() for budget in (1, 3, 4, 9)}
    assert kept[1] == [[True, False, False], [False, False, False]]
    assert kept[3] == [[True, True, False], [True, False, False]]
    assert kept[4] == [[True, True, False], [True, True, False]]
    assert kept[9] == [[True, True, True], [True, True, False]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fade": "256"}, "fade is '256'; it must be None or a number of tokens above 0"),
        ({"read_credit": None}, "read_credit is None; it must be a finite number"),
        ({"read_power": "false"}, "read_power is 'false'; it must be True or False"),
        ({"same_key": True}, "same_key is True; it must be None or a cosine"),
        ({"state_scale": "1"}, "state_scale is '1'; it must be None or a finite number"),
        ({"fade": 0.0}, "fade is 0.0; it must be None or a number of tokens above 0"),
        ({"read_credit": float("nan")}, "read_credit is nan; it must be a finite number"),
        ({"same_key": 1.0}, "same_key is 1.0; it must be None or a cosine between 0 and 1"),
        ({"budget": 0}, "budget is 0; it must be None or an integer of at least 1"),
        (
            {"fade": 9.0, "score": "recency"},
            "fade is 9.0 and the score 'recency'; it is of the scores surprise, residual",
        ),
        ({"score": "recall", "write": "eviction", "budget": 4}, "write='eviction' does not go with budget=4"),
        ({"read_power": True, "fade": 9.0}, "read_power goes with scores as they are, and fade is 9.0"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**wrong)
