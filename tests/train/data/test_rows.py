"""Rows out of a line of tokens: nothing lost, nothing twice, no document in another, the same for the same seed."""

import itertools

import numpy as np
import pytest

from train.data.rows import PackedRows
from train.data.tokens import InMemory

EOS = 10**6


def line(lengths, record):
    """Documents whose tokens are all different, so that a token names its place."""
    places = np.cumsum([0, *lengths])
    return InMemory([np.arange(a, b) for a, b in itertools.pairwise(places)], EOS, record)


@pytest.mark.parametrize(
    ("lengths", "record", "row"),
    [([5, 1, 30, 7], 8, 8), ([5, 1, 30, 7], 8, 3), ([5, 1, 30, 7], 8, 20), ([64], 8, 8), ([3], 8, 8), ([90, 2], 1, 16)],
)
def test_every_token_of_an_epoch_is_the_input_of_exactly_one_row(lengths, record, row):
    tokens = line(lengths, record)
    rows = PackedRows(tokens, row, shuffle=3)
    epochs = 4 * row  # so many epochs are a whole number of rows
    inputs = np.concatenate([rows[i]["tokens"][:-1] for i in range(4 * len(tokens))])
    for epoch in inputs.reshape(epochs, len(tokens)):
        assert sorted(epoch) == sorted(tokens.tokens)


@pytest.mark.parametrize(("record", "row"), [(8, 8), (8, 3), (8, 20), (16, 64)])
def test_a_segment_is_a_run_of_one_document_and_what_counts_is_its_next_token(record, row):
    tokens = line([5, 1, 30, 7, 60, 61, 2], record)
    successor = dict(itertools.pairwise(tokens.tokens))
    first = {int(token) for token in tokens.tokens[tokens.begins]}
    rows = PackedRows(tokens, row, shuffle=0)
    for index in range(50):
        found = rows[index]
        assert found["tokens"].dtype == found["segment_ids"].dtype == np.int32 and found["mask"].dtype == bool
        assert len(found["tokens"]) == len(found["segment_ids"]) == len(found["mask"]) == row + 1
        assert found["segment_ids"][0] == 1 and set(np.diff(found["segment_ids"])) <= {0, 1}
        assert not found["mask"][-1]
        for t in range(row):
            now, after = found["tokens"][t : t + 2]
            same = found["segment_ids"][t] == found["segment_ids"][t + 1]
            assert found["mask"][t] == same
            if same:
                assert now != EOS and int(after) not in first
                assert after == EOS or successor[now] == after


def test_a_row_longer_than_a_record_is_one_run_of_neighbours():
    tokens = line([1000], 8)
    rows = PackedRows(tokens, 64, shuffle=5)
    for index in range(12):  # whole units: no seam but before the token that is no input
        assert set(rows[index]["segment_ids"][:-1]) == {1}


def test_rows_are_a_function_of_the_seed_and_their_number():
    tokens = line([500, 300], 8)
    one, same, other = (PackedRows(tokens, 8, shuffle=seed) for seed in (1, 1, 2))
    order = [7, 3, 10**9, 7]
    assert all(np.array_equal(one[i]["tokens"], same[i]["tokens"]) for i in order)
    assert any(not np.array_equal(one[i]["tokens"], other[i]["tokens"]) for i in order)
    epoch = len(tokens) // 8
    assert any(not np.array_equal(one[i]["tokens"], one[i + epoch]["tokens"]) for i in range(5))


def test_unshuffled_rows_keep_the_order_and_end():
    tokens = line([50], 8)
    rows = PackedRows(tokens, 8, shuffle=None)
    assert len(rows) == 6
    assert np.concatenate([rows[i]["tokens"][:-1] for i in range(len(rows))]).tolist() == list(range(48))
