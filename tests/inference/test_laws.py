"""Laws 1, 3 and 6 for whole models, in the programs that read and write."""

import numpy as np
import pytest

from hola_jax.inference import GREEDY, Prefix
from tests.inference.models import generator, model
from tests.laws.mixers import MIXERS

LONG = "It was the best of times, it was the worst"  # 42 bytes: three pieces, the last not full
TOLERANCE = 2e-5  # float32, sums of some dozens of terms near 1 taken in another order


def logits(prefix: Prefix) -> np.ndarray:
    return np.asarray(prefix.memory.logits)[: len(prefix)]


@pytest.mark.parametrize("mixer", MIXERS)
def test_reading_and_writing_obey_the_laws(mixer: str) -> None:
    """Law 1: in pieces, split anywhere or token by token, a prefix leaves what one call over it would. Law 3: nor does it
    matter what stands in the other row, and padding least of all: bitwise. Law 6: the memory has one size."""
    g, tokens = generator(mixer), np.frombuffer(LONG.encode(), np.uint8).astype(np.int32)
    # Token by token is what the loop that writes does: its greedy tokens are those of one call over all of them.
    wrote = g.generate([LONG, "a"], max_tokens=9, sampling=GREEDY, stop_tokens=[])[0]
    assert wrote.tokens == g.generate([LONG], max_tokens=9, sampling=GREEDY, stop_tokens=[])[0].tokens
    called = np.asarray(model(mixer)(np.concatenate([tokens, wrote.tokens]).astype(np.int32)[None])[0])[0]
    assert np.argmax(called[41:-1], axis=-1).tolist() == wrote.tokens
    whole, alone = called[41], g.read([LONG])
    np.testing.assert_allclose(logits(alone)[0], whole, atol=TOLERANCE)
    beside, split = g.read([LONG, "a"]), g.read([LONG[27:], "bc"], g.read([LONG[:27], "a"]))
    np.testing.assert_array_equal(logits(beside)[0], logits(alone)[0])
    np.testing.assert_allclose(logits(split)[0], whole, atol=TOLERANCE)
    assert split.positions == [42, 3] and split.nbytes == beside.nbytes == alone.nbytes


def test_the_tokens_kept_do_not_depend_on_how_the_prompt_is_cut() -> None:
    g = generator()
    whole, split = g.read([LONG]), g.read([LONG[11:]], g.read([LONG[:11]]))
    kept = [np.asarray(p.memory.state.memory.cache_positions)[:, 0] for p in (whole, split)]
    np.testing.assert_array_equal(*kept)
