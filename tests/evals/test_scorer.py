"""The model as a scorer says, in batches and pieces, what one call on each row alone says."""

import jax
import numpy as np
import pytest

from hola_jax.evals import ModelScorer
from tests.evals.small import model

LENGTHS = (5, 90, 33, 2, 70, 64, 65)


def rows(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(256, size=length).astype(np.int32) for length in lengths]


LONGEST = 96


def logits_of(lm, row):
    """By one call on the row alone; padded at the end, which no earlier token sees, so that one program serves all."""
    return lm(np.pad(row, (0, LONGEST - len(row)))[None])[0][0, : len(row)]


def alone(lm, row):
    logits = logits_of(lm, row)[:-1]
    logprob = jax.nn.log_softmax(logits)[np.arange(len(row) - 1), row[1:]]
    return np.asarray(logprob), np.asarray(logits.argmax(-1) == row[1:])


def greedily(lm, row, given):
    """The likeliest token behind the row and behind each of `given`, by one call: `given` is greedy where it is these."""
    logits = logits_of(lm, np.concatenate([row, given]))
    return np.asarray(logits[len(row) - 1 : -1].argmax(-1))


@pytest.mark.parametrize("mixer", ["hola", "transformer"])
def test_each_row_scores_as_it_does_alone(mixer):
    lm, told = model(mixer), []
    scorer = ModelScorer(lm, piece=32, batch_tokens=128, head_tokens=40)
    given = rows(LENGTHS)
    for row, found in zip(given, scorer.loglikelihood(given, told.append), strict=True):
        logprob, greedy = alone(lm, row)
        np.testing.assert_allclose(found.logprob, logprob, rtol=1e-4, atol=1e-4)  # float32 sums in another order
        np.testing.assert_array_equal(found.greedy, greedy)  # no two logits are near each other
    assert sum(told) == len(LENGTHS)


@pytest.mark.parametrize("mixer", ["hola", "transformer"])
def test_a_batch_of_prompts_continues_as_each_does_alone(mixer):
    lm = model(mixer)
    given = rows((40, 3, 33, 60), seed=1)
    found = ModelScorer(lm, piece=32, batch_tokens=128).greedy(given, 36)
    for row, generated in zip(given, found, strict=True):
        np.testing.assert_array_equal(generated, greedily(lm, row, generated))
        assert len(generated) == 36


def test_decoding_ends_when_all_have_enough():
    scorer = ModelScorer(model(), piece=32)
    found = scorer.greedy(rows((4, 5)), 200, until=lambda number, tokens: len(tokens) >= 10)
    assert all(10 <= len(tokens) < 200 for tokens in found)


def test_the_pieces_do_not_grow_with_the_row():
    scorer = ModelScorer(model(), piece=64)
    assert scorer._pieces(1) == [(0, 32)]
    assert scorer._pieces(130) == [(0, 64), (64, 64), (128, 32)]
    assert {length for _, length in scorer._pieces(10**6)} == {64}


def test_what_does_not_fit_is_refused():
    scorer = ModelScorer(model("transformer", max_length=64))
    with pytest.raises(ValueError, match=r"row 1 has 60 tokens and 8 to generate.* holds 64"):
        scorer.greedy(rows((10, 60)), 8)
    with pytest.raises(ValueError, match="row 0 has the token 256; the model's vocabulary has 256"):
        scorer.loglikelihood([np.array([1, 256])])
    with pytest.raises(ValueError, match="row 0 has 1 tokens; it must have at least 2"):
        scorer.loglikelihood([np.array([1])])
    with pytest.raises(ValueError, match="max_tokens is 0"):
        scorer.greedy(rows((4,)), 0)
    with pytest.raises(ValueError, match="piece is 1; it must be at least 32"):
        ModelScorer(model(), piece=1)
