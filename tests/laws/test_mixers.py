"""The laws that every mixer obeys, whatever it remembers; one suite over all of `mixers.MIXERS`."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hola_jax.layers import MIXERS as CLASSES
from tests.laws.mixers import BY_KERNELS, BY_SCORE, MIXERS, TOKENS, small

CASES = [*MIXERS, *BY_KERNELS, *BY_SCORE]
TOLERANCE = 2e-5  # float32, sums of some dozens of terms near 1 taken in another order


class Case(NamedTuple):
    run: object  # (x, segment_ids, state) -> (y, state), compiled
    empty: object
    x: np.ndarray  # [2, tokens, D]
    whole: np.ndarray  # outputs of the two rows, one document each

    @property
    def tokens(self) -> int:
        return self.x.shape[1]


@functools.cache
def case(mixer: str) -> Case:
    config = small(mixer)
    cls = CLASSES[config.mixer]
    structure, params = nnx.split(cls(config, jax.random.key(0)))
    # Larger weights than at initialisation, so that what the memory holds is seen in the outputs.
    params = jax.tree.map(lambda p: p * 8 if p.ndim == 2 else p, nnx.to_pure_dict(params))
    run = jax.jit(lambda x, segment_ids=None, state=None: nnx.merge(structure, params)(x, segment_ids, state))
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, BY_KERNELS.get(mixer, TOKENS), config.dim)), np.float32)
    whole, _ = run(x)
    assert np.abs(whole).max() > 1e-2
    return Case(run, cls.init_state(config, 2), x, np.asarray(whole))


def placed(case: Case, rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [start, stop) of each row at place `at`, in padding that holds garbage; and their segment ids."""
    x, ids = np.full_like(case.x, 7.0), np.zeros(case.x.shape[:2], np.int32)
    for row, (start, stop, at) in enumerate(rows):
        x[row, at : at + stop - start] = case.x[row, start:stop]
        ids[row, at : at + stop - start] = 1
    return x, ids


@pytest.mark.parametrize("mixer", CASES)
def test_any_split_gives_the_whole(mixer: str) -> None:
    """Rows split at different places, with padding at either end of each piece."""
    c, tokens = case(mixer), case(mixer).tokens
    for cuts in ((0, tokens), (1, tokens - 1), (6, 9), (8, 4)):
        first, state = c.run(*placed(c, [(0, cuts[0], 0), (0, cuts[1], tokens - cuts[1])]), c.empty)
        second, _ = c.run(*placed(c, [(cuts[0], tokens, cuts[0]), (cuts[1], tokens, 0)]), state)
        for row, cut in enumerate(cuts):
            at = (0, tokens - cut)[row]
            np.testing.assert_allclose(first[row, at : at + cut], c.whole[row, :cut], atol=TOLERANCE)
            at = (cut, 0)[row]
            np.testing.assert_allclose(second[row, at : at + tokens - cut], c.whole[row, cut:], atol=TOLERANCE)


@pytest.mark.oldest
@pytest.mark.parametrize("mixer", CASES)
def test_token_by_token_gives_the_whole_and_padding_is_nothing(mixer: str) -> None:
    c = case(mixer)
    state, got = c.empty, []
    for t in range(c.tokens):
        if t == 5:  # one row waits: a step of padding
            waiting = np.array([[1], [0]], np.int32)
            out, state = c.run(c.x[:, t : t + 1], waiting, state)
            rest, state = c.run(c.x[:, t : t + 1], 1 - waiting, state)
            got.append(np.concatenate([out[:1], rest[1:]]))
            continue
        out, state = c.run(c.x[:, t : t + 1], np.ones((2, 1), np.int32), state)
        got.append(out)
    np.testing.assert_allclose(np.concatenate(got, axis=1), c.whole, atol=TOLERANCE)


@pytest.mark.parametrize("mixer", CASES)
def test_a_padded_row_gives_what_it_gives_alone(mixer: str) -> None:
    c, real = case(mixer), case(mixer).tokens - 4
    out, _ = c.run(*placed(c, [(0, real, 4), (0, real, 0)]), c.empty)
    np.testing.assert_allclose(out[0, 4:], c.whole[0, :real], atol=TOLERANCE)
    np.testing.assert_allclose(out[1, :real], c.whole[1, :real], atol=TOLERANCE)


@pytest.mark.parametrize("mixer", CASES)
@pytest.mark.parametrize("change", ["other numbers", "NaN"])
def test_documents_do_not_reach_each_other(mixer: str, change: str) -> None:
    c = case(mixer)
    ids = np.array([[1] * 4 + [2] * (c.tokens - 8) + [3] * 4, [1] * 2 + [2] * (c.tokens - 4) + [3] * 2], np.int32)
    other = c.x.copy()
    other[ids == 2] += 1.0
    if change == "NaN":
        other[0, 5], other[1, 3] = np.nan, np.nan
    before, _ = c.run(c.x, ids, c.empty)
    after, state = c.run(other, ids, c.empty)
    np.testing.assert_array_equal(np.asarray(after)[ids != 2], np.asarray(before)[ids != 2])
    assert not np.array_equal(np.asarray(after)[ids == 2], np.asarray(before)[ids == 2])
    # A document that begins later is not reached either, through the state.
    x, later = c.x[:, :1], np.full((2, 1), 4, np.int32)
    unspoilt = c.run(c.x, ids, c.empty)[1]
    np.testing.assert_array_equal(c.run(x, later, state)[0], c.run(x, later, unspoilt)[0])
    if change == "NaN":
        assert np.isnan(np.asarray(after)[0, 5:-4]).all() and np.isnan(np.asarray(after)[1, 3:-2]).all()
        assert np.isfinite(np.asarray(after)[0, 4]).all()


@pytest.mark.parametrize("mixer", CASES)
def test_the_state_keeps_its_size(mixer: str) -> None:
    c = case(mixer)
    _, state = c.run(c.x)
    assert jax.tree.structure(state) == jax.tree.structure(c.empty)
    sizes = [[(x.shape, x.dtype) for x in jax.tree.leaves(s)] for s in (state, c.empty)]
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.oldest
@pytest.mark.parametrize("mixer", MIXERS)
def test_nothing_reaches_back_in_time(mixer: str) -> None:
    """The gradient of each output by each later input is exactly zero, and by its own input it is not. Of HOLA's kernels:
    test_isolation.py; the delta rule's has the reference's gradients (memory/test_linear.py)."""
    c = case(mixer)
    pull = jax.jit(jax.grad(lambda x, weight: jnp.sum(c.run(x)[0] * weight)))
    for t in (0, 5, 8):
        weight = np.zeros_like(c.whole)
        weight[:, t] = np.linspace(-1.0, 1.0, c.x.shape[-1])
        gradient = np.asarray(pull(c.x, weight))
        assert (gradient[:, t + 1 :] == 0).all()
        assert np.abs(gradient[:, t]).max() > 1e-4 and np.isfinite(gradient).all()
