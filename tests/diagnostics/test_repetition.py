"""Repetitions: found where they are, as far back as they are, and only where the training text has none."""

import numpy as np
import pytest

from hola_jax.diagnostics import repetition


def test_a_repetition_is_found_where_its_last_token_stands_again():
    tokens = np.array([1, 2, 3, 9, 1, 2, 3, 1, 2, 4, 2, 3, 9])
    found = repetition.distances(tokens, 2, 10)  # 1 2 3 stands twice, and 2 3 9
    assert np.flatnonzero(found).tolist() == [6, 12]
    assert found[[6, 12]].tolist() == [4, 9]


def test_the_latest_time_counts():
    tokens = np.array([5, 6, 0, 5, 6, 0, 0, 5, 6])
    assert repetition.distances(tokens, 1, 7)[[4, 8]].tolist() == [3, 4]


def test_distances_agree_with_a_search_by_hand():
    tokens = np.random.default_rng(0).integers(0, 4, 200)
    known = [tuple(row) for row in np.random.default_rng(1).integers(0, 4, (30, 3))]
    expected = np.zeros(200, int)
    for t in range(2, 200):
        here = tuple(tokens[t - 2 : t + 1])
        before = [s for s in range(2, t) if tuple(tokens[s - 2 : s + 1]) == here]
        expected[t] = t - before[-1] if before and here not in known else 0
    texts = [np.array(row) for row in known]
    found = repetition.distances(tokens, 2, 4, repetition.known_sequences(texts, 3, 4))
    np.testing.assert_array_equal(found, expected)
    assert 0 < np.count_nonzero(found) < np.count_nonzero(repetition.distances(tokens, 2, 4))


def test_a_text_too_short_repeats_nothing():
    assert repetition.distances(np.array([1, 1]), 3, 5).tolist() == [0, 0]


def test_sequences_that_fit_no_number_are_refused():
    with pytest.raises(ValueError, match="13 tokens out of 32000 do not fit one number"):
        repetition.sequences(np.arange(20), 13, 32000)


def test_recall_is_summed_by_text_and_range():
    assert repetition.edges(32, 64, 2048) == [64, 96, 192, 384, 768, 2048] and repetition.edges(0, 64, 64) == [64]
    edges = repetition.edges(32, 64, 1000)
    assert edges == [64, 96, 192, 384, 1000]
    far = [np.array([0, 64, 65, 97]), np.array([1000, 1, 0, 0])]
    right = [np.array([True, True, False, True]), np.array([False, True, True, True])]
    nats = [np.array([9.0, 1.0, 2.0, 3.0]), np.array([4.0, 5.0, 9.0, 9.0])]
    found = repetition.recall(far, right, nats, edges)
    assert found.asked.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 1]]
    assert found.right.tolist() == [[1, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert found.nats.tolist() == [[1, 2, 3, 0, 0], [5, 0, 0, 0, 4]]


def test_a_difference_is_clear_where_all_texts_agree_and_not_where_they_do_not():
    draw = np.random.default_rng(0)
    count, base = np.full(50, 10.0), draw.normal(20, 5, 50)
    same, split = base + 1, base + np.where(np.arange(50) % 2, 3, -2.8)
    clear, unclear = repetition.difference(same, base, count), repetition.difference(split, base, count)
    assert clear.clear and clear.value == pytest.approx(0.1) and clear.error < 1e-6
    assert not unclear.clear and unclear.error == pytest.approx(2.9 / 10 / 50**0.5, rel=0.1)
    once, never = np.eye(50)[0], np.zeros(50)  # asked in one text alone: draws without it tell nothing
    assert repetition.difference(once, never, once) == (1.0, 0.0)
    assert not repetition.difference(np.zeros(3), np.zeros(3), np.zeros(3)).clear
