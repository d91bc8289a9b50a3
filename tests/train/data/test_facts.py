"""Facts among noise: each question has one answer, told before it; the same rows for the same seed."""

import dataclasses

import numpy as np
import pytest

from train.data.config import Facts, TextFolder
from train.data.facts import FactRows
from train.data.loader import identity, open_source

TASK = Facts(most=6, fewest=2, asked=4, kinds=16)


def facts(row):
    """{key: value} told in the first three quarters, and (key, value) of the questions."""
    tokens, last = row["tokens"], 3 * (len(row["tokens"]) - 1) // 4
    pairs = [(int(tokens[t]), int(tokens[t + 1]), t) for t in range(len(tokens) - 1) if 16 <= tokens[t] < 32]
    return {key: value for key, value, t in pairs if t < last}, [(k, v, t) for k, v, t in pairs if t >= last]


def test_every_question_was_told_and_only_its_answer_counts():
    rows = FactRows(TASK, 64, seed=3, first=16)
    counts = set()
    for index in range(60):
        row = rows[index]
        told, asked = facts(row)
        counts.add(len(told))
        assert len(asked) == min(4, len(told)) == row["mask"].sum() and len({key for key, *_ in asked}) == len(asked)
        for key, value, t in asked:
            assert told[key] == value and 32 <= value < 48 and row["mask"][t]
        assert set(row["segment_ids"]) == {1} and len(row["tokens"]) == 65
    assert counts == {2, 3, 4, 5, 6}


def test_rows_are_a_function_of_seed_and_number():
    one, same, other = (FactRows(TASK, 64, seed, first=16) for seed in (1, 1, 2))
    assert all(np.array_equal(one[i]["tokens"], same[i]["tokens"]) for i in (5, 10**12))
    assert not np.array_equal(one[5]["tokens"], other[5]["tokens"])
    assert not np.array_equal(one[5]["tokens"], one[6]["tokens"])


def test_facts_stand_where_they_are_wanted():
    rows = FactRows(Facts(most=1, told=(0.05, 0.15)), 200, seed=0, first=64)
    for index in range(30):
        tokens = rows[index]["tokens"]
        assert 10 <= np.flatnonzero((tokens >= 64) & (tokens < 128))[0] < 30


def test_a_corrected_fact_is_told_twice_and_the_later_value_is_the_answer():
    rows = FactRows(Facts(most=6, fewest=2, asked=4, kinds=16, corrected=0.5), 64, seed=3, first=16)
    for index in range(60):
        row = rows[index]
        tokens = row["tokens"]
        latest, asked = facts(row)
        values: dict[int, list[int]] = {}
        for t in np.flatnonzero((tokens[:48] >= 16) & (tokens[:48] < 32)):
            values.setdefault(int(tokens[t]), []).append(int(tokens[t + 1]))
        twice = [each for each in values.values() if len(each) == 2]
        assert len(twice) == round(len(values) / 2) and all(old != new for old, new in twice)
        assert all(32 <= value < 48 for each in values.values() for value in each)
        assert all(latest[key] == value for key, value, _ in asked)


def test_they_stand_in_a_text_whose_tokens_stay(tmp_path):
    (tmp_path / "a.txt").write_text("words of the text " * 40)
    task = Facts(most=2, noise=TextFolder(str(tmp_path), held_out=0.0), kinds=8)
    assert identity(task)["vocab_size"] == 256 + 16 and identity(task)["tokenizer"] == "bytes"
    row = open_source(task, split="train", vocab_size=272, row=64, seed=0)[0]
    text = row["tokens"][row["tokens"] < 256]
    assert len(text) >= 65 - 8 and set(bytes(text.astype(np.uint8))) <= {*b"words of the text ", 255}
    counted = dataclasses.replace(task, answers_count=9)
    both = open_source(counted, split="train", vocab_size=272, row=64, seed=0)[0]
    assert np.array_equal(both["tokens"], row["tokens"])
    assert np.array_equal(both["mask"][:-1], 9 * row["mask"][:-1] + (row["tokens"][1:] < 256)) and not both["mask"][-1]
    with pytest.raises(ValueError, match="vocabulary of 100"):
        open_source(task, split="train", vocab_size=100, row=64, seed=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="rows of 16 tokens have room for 6 facts and 2 questions"):
        FactRows(TASK, 16, seed=0, first=16)
    for wrong in (
        {"most": 0},
        {"fewest": 3, "most": 2},
        {"most": 65},
        {"asked": 0},
        {"told": (0.5, 0.2)},
        {"told": (0, 1)},
        {"answers_count": 2},
        {"answers_count": 0, "noise": TextFolder("texts")},
        {"corrected": 1.5},
        {"corrected": 0.5, "kinds": 1, "most": 1},
    ):
        with pytest.raises(ValueError, match=r"must be|is of a text"):
            Facts(**wrong)
