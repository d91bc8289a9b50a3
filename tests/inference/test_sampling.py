"""The choice of a token: each filter leaves exactly what its definition leaves, and draws follow the probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hola_jax import Sampling
from hola_jax.inference.sampling import GREEDY, choose, settings

LOGITS = np.log(np.array([0.05, 0.4, 0.15, 0.3, 0.1], np.float32))
RUN = jax.jit(choose)


def drawn(how: Sampling, draws: int = 512, seen: tuple[int, ...] = (), logits: np.ndarray = LOGITS) -> np.ndarray:
    """How often each token is drawn."""
    held = np.zeros((draws, 5), bool)
    held[:, list(seen)] = True
    rows = settings([how] * draws, [3] * draws, draws)
    tokens = RUN(np.tile(logits, (draws, 1)), held, np.arange(draws, dtype=np.int32), rows)
    return np.bincount(np.asarray(tokens), minlength=5) / draws


@pytest.mark.parametrize(
    ("how", "left"),
    [
        (GREEDY, {1}),
        (Sampling(temperature=0), {1}),
        (Sampling(), {0, 1, 2, 3, 4}),
        (Sampling(top_k=2), {1, 3}),
        (Sampling(top_k=99), {0, 1, 2, 3, 4}),
        (Sampling(top_p=0.3), {1}),
        (Sampling(top_p=0.6), {1, 3}),
        (Sampling(top_p=0.8), {1, 3, 2}),
        (Sampling(top_k=3, top_p=0.45), {1}),  # 0.4 / 0.85 is more than 0.45
        (Sampling(min_p=0.5), {1, 3}),
        (Sampling(min_p=1.0), {1}),
    ],
)
def test_a_filter_leaves_what_it_says(how: Sampling, left: set[int]) -> None:
    assert set(np.flatnonzero(drawn(how))) == left


def test_draws_follow_the_probabilities() -> None:
    for temperature in (0.5, 1.0, 2.0):
        wanted = jax.nn.softmax(jnp.asarray(LOGITS) / temperature)
        found = drawn(Sampling(temperature=temperature), 4096)
        np.testing.assert_allclose(found, wanted, atol=4 * 0.5 / 64)  # four deviations of 4096 draws


def test_a_repeated_token_is_penalised_whatever_its_sign() -> None:
    signed = np.array([-1.0, 2.0, 1.5, -3.0, 0.0], np.float32)
    how = Sampling(sampler="greedy", repetition_penalty=2.0)
    assert drawn(how, 2, (1,), signed)[2] == 1  # 2 / 2 is below 1.5
    assert drawn(Sampling(sampler="greedy", repetition_penalty=0.5), 2, (3,), signed)[1] == 1
    negative = np.array([-1.0, -1.1, -5.0, -5.0, -5.0], np.float32)
    assert drawn(how, 2, (0,), negative)[1] == 1  # -1 * 2 is below -1.1


def test_a_row_is_not_moved_by_its_neighbours() -> None:
    hows = [Sampling(), GREEDY, Sampling(top_k=2), Sampling(top_p=0.5, min_p=0.1)]
    place, held = np.arange(4, dtype=np.int32), np.zeros((4, 5), bool)
    together = RUN(np.tile(LOGITS, (4, 1)), held, place, settings(hows, [5, 6, 7, 8], 4))
    for row, how in enumerate(hows):
        seeds = [5 + row] * 4
        alone = RUN(np.tile(LOGITS, (4, 1)), held, np.full(4, row, np.int32), settings([how] * 4, seeds, 4))
        assert int(alone[0]) == int(together[row])


def test_seeds_of_any_size_are_taken_modulo_two_to_the_32() -> None:
    found = settings([GREEDY] * 2, [2**40 + 7, -1], 2).seed
    assert [int(seed) for seed in found] == [7, 2**32 - 1]
