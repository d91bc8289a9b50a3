"""The short convolution against its sum written out, and along a mesh axis."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify
from jax.sharding import Mesh, PartitionSpec

from hola_jax.layers.conv import ShortConvolution, init_state

B, T, E = 2, 16, 6
CONV = ShortConvolution(E, 4, jax.random.key(0), check=False)
X = np.asarray(jax.random.normal(jax.random.key(1), (B, T, E)), np.float32)
IDS = np.array([[0] * 3 + [1] * 6 + [4] * 7, [1] * 2 + [2] * 9 + [3] * 3 + [0] * 2], np.int32)
RUN = jax.jit(lambda x, ids, state: CONV(x, ids, state))


def written_out(x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    kernel, out = np.asarray(CONV.kernel[...]), np.zeros_like(x)
    for row in range(B):
        for t in range(T):
            taps = [s for s in range(max(0, t - 3), t + 1) if ids[row, s] == ids[row, t]]
            out[row, t] = sum(kernel[3 - (t - s)] * x[row, s] for s in taps)
    return out / (1 + np.exp(-out))


def test_equals_the_sum_over_the_document() -> None:
    out, state = RUN(X, IDS, init_state(B, E, 4, np.float32))
    np.testing.assert_allclose(out[IDS > 0], written_out(X, IDS)[IDS > 0], atol=1e-6)
    np.testing.assert_array_equal(state.inputs, np.stack([X[0, 13:], X[1, 11:14]]))
    np.testing.assert_array_equal(state.documents, [[4] * 3, [3] * 3])
    assert state.document.tolist() == [4, 3]


def test_the_state_is_the_last_real_tokens_whatever_the_pieces() -> None:
    whole = written_out(X, IDS)
    for cut in (1, 4, 9, 14):
        state, got = init_state(B, E, 4, np.float32), []
        for start, stop in ((0, cut), (cut, T)):
            ids = np.where((np.arange(T) >= start) & (np.arange(T) < stop), IDS, 0)
            out, state = RUN(np.where(ids[..., None] > 0, X, np.nan), ids, state)  # padding holds NaN
            got.append(np.where(ids[..., None] > 0, out, 0))
        np.testing.assert_allclose((got[0] + got[1])[IDS > 0], whole[IDS > 0], atol=1e-6)


def test_without_a_state_it_begins_with_an_empty_one() -> None:
    """Also where a row is shorter than what it remembers, behind padding that holds NaN."""
    for stop in (4, T):
        ids = np.where(np.arange(T) < stop, IDS, 0)
        x = np.where(ids[..., None] > 0, X, np.nan)
        out, state = RUN(x, ids, None)
        expected, after = RUN(x, ids, init_state(B, E, 4, np.float32))
        np.testing.assert_allclose(out[ids > 0], expected[ids > 0], atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, state, after)


@pytest.mark.parametrize("packed", [False, True])
def test_along_a_mesh_axis_it_is_the_same(packed: bool) -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("sequence",))
    along, whole = PartitionSpec(None, "sequence"), PartitionSpec()
    ids = np.array([[1] * 6 + [4] * 10, [1] * 2 + [2] * 7 + [0] * 7], np.int32)  # one device holds a single real token
    start = init_state(B, E, 4, np.float32)
    graph, params = nnx.split(CONV)

    def run(x, ids, state, axis):  # type: ignore[no-untyped-def]
        return nnx.merge(graph, params)(x, ids if packed else None, state, sequence_axis=axis)

    sharded = jax.shard_map(
        partial(run, axis="sequence"),
        mesh=mesh,
        in_specs=(along, along, whole),
        out_specs=(along, whole),
        check_vma=False,
    )
    out, state = jax.jit(sharded)(X, ids, start)
    expected, after = jax.jit(partial(run, axis=None))(X, ids, start)
    real = ids > 0 if packed else np.ones_like(ids, bool)
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state, after)


def test_padding_inside_a_document_is_refused_where_values_are_checked() -> None:
    layer = ShortConvolution(E, 4, jax.random.key(0), check=True)
    run = jax.jit(checkify.checkify(lambda x, ids: layer(x, ids)[0]))
    run(X, IDS)[0].throw()
    with pytest.raises(checkify.JaxRuntimeError, match="padding inside a document"):
        run(X, np.array([[1, 0, 1] + [2] * 13, [1] * 16], np.int32))[0].throw()
