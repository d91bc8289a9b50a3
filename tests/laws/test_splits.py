"""Law 1: whole == split anywhere == token by token, with the same tokens kept; law 6: the state's size is constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hola_jax.memory import MemoryConfig, cached_positions, init_state
from tests.laws.cases import (
    CONFIG,
    KEY_HEADS,
    SEGMENTS,
    B,
    H,
    K,
    T,
    V,
    assert_close,
    assert_same_state,
    compiled,
    inputs,
    run_in_pieces,
)


def empty(config=CONFIG, batch=B):
    return init_state(config, batch, H, K, V, key_heads=KEY_HEADS)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "documents"])
@pytest.mark.parametrize(
    ("cuts", "implementation"), [([13], "xla"), ([8, 16], "xla"), ([3, 4, 35], "xla"), ([13], "interpret")]
)
def test_whole_is_split(cuts, segments, implementation):
    arrays = inputs()
    whole, state = compiled(CONFIG)(arrays, segments)
    parts, after = run_in_pieces(compiled(CONFIG, implementation), arrays, segments, cuts, empty())
    assert_close(parts, whole)
    assert_same_state(after, state)


WAYS = [("surprise", "xla"), ("residual", "xla"), ("write", "xla"), ("random", "xla"), ("surprise", "reference")]
WAYS.append(("surprise", "interpret"))


@pytest.mark.parametrize(("score", "implementation"), WAYS)
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "documents"])
def test_whole_is_token_by_token(score, segments, implementation):
    config = MemoryConfig(window=4, block=8, chunk=4, score=score)
    arrays = inputs(1)
    whole, state = compiled(config)(arrays, segments)
    steps, after = run_in_pieces(compiled(config, implementation), arrays, segments, list(range(1, T)), empty(config))
    assert_close(steps, whole)
    assert_same_state(after, state)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_rows_stand_at_different_places_in_their_blocks(implementation):
    """Row 0 has read 5 tokens, row 1 has read 11; both continue in one call."""
    arrays = inputs(2)
    heads = [[x[i : i + 1, :n] for x in arrays] for i, n in ((0, 5), (1, 11))]
    states = [compiled(CONFIG)(part)[1] for part in heads]
    state = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *states)
    tail = [jnp.stack([x[0, 5:25], x[1, 11:31]]) for x in arrays]
    out, after = compiled(CONFIG, implementation)(tail, None, state)
    for row, stop in ((0, 25), (1, 31)):
        alone, alone_state = compiled(CONFIG)([x[row : row + 1, :stop] for x in arrays])
        assert_close(out[row : row + 1], alone[:, -20:])
        assert_same_state(jax.tree.map(lambda x, row=row: x[row : row + 1], after), alone_state)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_layout_of_documents_splits_anywhere(data):
    """Documents of any length, padding on either side, gates from none to total, cut anywhere."""
    segments = np.zeros((B, T), np.int32)
    for row in range(B):
        left, right = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
        ends = sorted(data.draw(st.sets(st.integers(left + 1, T - right - 1), max_size=4)))
        for number, (a, b) in enumerate(zip([left, *ends], [*ends, T - right], strict=True)):
            segments[row, a:b] = number + 1
    arrays = inputs(data.draw(st.integers(0, 1000)))
    arrays[4] = arrays[4] * data.draw(st.sampled_from([0.0, 1.0, 50.0]))
    cut = data.draw(st.sampled_from([5, 13, 24]))
    whole, state = compiled(CONFIG)(arrays, segments)
    parts, after = run_in_pieces(compiled(CONFIG), arrays, segments, [cut], empty())
    assert_close(parts, whole)
    assert_same_state(after, state)


def test_bytes_do_not_depend_on_the_number_of_tokens():
    sizes = {compiled(CONFIG)(inputs(0, tokens))[1].nbytes for tokens in (1, 9, T)}
    assert sizes == {empty().nbytes}


def test_cached_positions_are_those_of_the_largest_scores():
    arrays = inputs(3)
    config = MemoryConfig(window=4, block=8, chunk=4, score="write")
    _, state = compiled(config)(arrays)
    scores = np.asarray(arrays[3]) * np.linalg.norm(np.asarray(arrays[2]), axis=-1)
    complete = T // 8 * 8
    best = np.argsort(-scores[:, :complete], axis=1)[:, :4].swapaxes(1, 2)
    np.testing.assert_array_equal(cached_positions(state), best)
