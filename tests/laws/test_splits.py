"""Law 1: whole == split anywhere == token by token, with the same tokens kept; law 6: the state's size is constant.

Every length of a piece is a program to compile, so the cuts share few lengths: 1, 3, 8, 13 and 24 of 37 tokens.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hola_jax.memory import MemoryConfig, cached_positions, init_state
from tests.laws.cases import (
    CONFIG,
    FEW,
    KEY_HEADS,
    OTHER,
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


CUTS = {"mid-block": [13], "late": [24], "block edges": [8, 16, 24], "anywhere": [3, 4, 12, 36]}


@pytest.mark.parametrize(
    ("cuts", "segments", "implementation"),
    [
        ("mid-block", None, "xla"),
        pytest.param("block edges", None, "xla", marks=pytest.mark.slow),
        pytest.param("mid-block", SEGMENTS, "xla", marks=pytest.mark.oldest),
        ("block edges", SEGMENTS, "xla"),
        pytest.param("anywhere", SEGMENTS, "xla", marks=pytest.mark.slow),
        ("mid-block", SEGMENTS, "interpret"),
    ],
)
def test_whole_is_split(cuts, segments, implementation):
    arrays = inputs()
    whole, state = compiled(CONFIG)(arrays, segments)
    parts, after = run_in_pieces(compiled(CONFIG, implementation), arrays, segments, CUTS[cuts], empty())
    assert_close(parts, whole)
    assert_same_state(after, state)


@pytest.mark.parametrize(
    ("config", "implementation", "segments"),
    [
        ("surprise", "xla", None),
        ("surprise", "reference", None),
        ("surprise", "interpret", None),
        ("surprise", "xla", SEGMENTS),
        ("surprise", "reference", SEGMENTS),
        ("surprise", "interpret", SEGMENTS),
        pytest.param("residual", "xla", SEGMENTS, marks=pytest.mark.slow),
        pytest.param("write", "xla", SEGMENTS, marks=pytest.mark.slow),
        pytest.param("random", "xla", SEGMENTS, marks=pytest.mark.slow),
        *((name, "xla", SEGMENTS) for name in OTHER),
    ],
)
def test_whole_is_token_by_token(config, implementation, segments):
    config = OTHER.get(config) or MemoryConfig(window=4, block=8, chunk=4, score=config)
    arrays = inputs(1)
    whole, state = compiled(config)(arrays, segments)
    steps, after = run_in_pieces(compiled(config, implementation), arrays, segments, list(range(1, T)), empty(config))
    assert_close(steps, whole)
    assert_same_state(after, state)


@pytest.mark.parametrize("config", FEW.values(), ids=FEW)
def test_whole_is_split_whatever_the_score(config):
    """Cut in the middle of a block, and at its end, where rows stand at different places in theirs."""
    arrays = inputs()
    whole, state = compiled(config)(arrays, SEGMENTS)
    for cuts in ("mid-block", "late"):
        parts, after = run_in_pieces(compiled(config), arrays, SEGMENTS, CUTS[cuts], empty(config))
        assert_close(parts, whole)
        assert_same_state(after, state)
    assert after.nbytes == empty(config).nbytes


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_rows_stand_at_different_places_in_their_blocks(implementation):
    """Row 0 has read 5 tokens, row 1 has read 11; both continue in one call."""
    arrays, read, at = inputs(2), np.array([[5], [11]]), np.arange(T)
    _, state = compiled(CONFIG)([x[:, :13] for x in arrays], (at[:13] < read).astype(np.int32), empty())
    tail = [jnp.stack([x[0, 5:29], x[1, 11:35]]) for x in arrays]
    out, after = compiled(CONFIG, implementation)(tail, np.ones((B, 24), np.int32), state)
    whole, whole_state = compiled(CONFIG)(arrays, (at < read + 24).astype(np.int32))
    assert_close(out, jnp.stack([whole[0, 5:29], whole[1, 11:35]]))
    assert_same_state(after, whole_state)


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
    cuts = CUTS[data.draw(st.sampled_from(list(CUTS)))]
    whole, state = compiled(CONFIG)(arrays, segments)
    parts, after = run_in_pieces(compiled(CONFIG), arrays, segments, cuts, empty())
    assert_close(parts, whole)
    assert_same_state(after, state)


def test_bytes_do_not_depend_on_the_number_of_tokens():
    sizes = {compiled(CONFIG)(inputs(0, n), np.ones((B, n), np.int32), empty())[1].nbytes for n in (1, 8, 24)}
    assert sizes == {empty().nbytes}


def test_cached_positions_are_those_of_the_largest_scores():
    arrays = inputs(3)
    config = MemoryConfig(window=4, block=8, chunk=4, score="write")
    _, state = compiled(config)(arrays, np.ones_like(SEGMENTS))
    scores = np.asarray(arrays[3]) * np.linalg.norm(np.asarray(arrays[2]), axis=-1)
    complete = T // 8 * 8
    best = np.argsort(-scores[:, :complete], axis=1)[:, :4].swapaxes(1, 2)
    np.testing.assert_array_equal(cached_positions(state), best)
