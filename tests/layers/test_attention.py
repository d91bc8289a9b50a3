"""The Transformer's mixer: its capacity, and along a mesh axis."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify
from jax.sharding import Mesh, PartitionSpec

from hola_jax.layers import Attention
from hola_jax.layers.attention import rotate
from tests.laws.mixers import small

X = np.asarray(jax.random.normal(jax.random.key(1), (2, 12, 32)), np.float32)


def layer(**fields: object) -> Attention:
    return Attention(small("transformer", **fields), jax.random.key(0))


def test_rotation_makes_products_depend_on_the_distance() -> None:
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in (0, 1))

    @jax.jit
    def product(i: np.ndarray, j: np.ndarray) -> jax.Array:
        return (rotate(q, i, 100.0) * rotate(k, j, 100.0)).sum()

    place = lambda t: np.array([[t]], np.int32)  # noqa: E731
    np.testing.assert_allclose(product(place(3), place(1)), product(place(9), place(7)), rtol=1e-5)
    assert abs(product(place(3), place(1)) - product(place(3), place(2))) > 1e-3


def test_more_tokens_than_the_state_holds_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"x has 12 tokens and ModelConfig.max_length is 8"):
        layer(max_length=8)(X)


def test_a_full_state_is_loud() -> None:
    """NaN where it cannot be an error, an error where values are checked."""
    attention = layer(max_length=12, check=True)
    run = jax.jit(checkify.checkify(lambda x, state: attention(x, state=state)))
    error, (out, state) = run(X, Attention.init_state(attention.config, 2))
    error.throw()
    assert np.isfinite(out).all()
    error, (out, _) = run(X[:, :1], state)
    assert np.isnan(out).all()
    with pytest.raises(checkify.JaxRuntimeError, match="no room"):
        error.throw()


def test_an_implementation_it_does_not_have_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="dot_product_attention"):
        layer(implementation="pallas")(X)


@pytest.mark.parametrize("packed", [False, True])
def test_along_a_mesh_axis_it_is_the_same(packed: bool) -> None:
    attention = layer(key_heads=1)
    mesh = Mesh(np.array(jax.devices()[:4]), ("sequence",))
    along, whole = PartitionSpec(None, "sequence"), PartitionSpec()
    ids = np.array([[1] * 5 + [4] * 7, [1] * 2 + [2] * 7 + [0] * 3], np.int32)
    graph, params = nnx.split(attention)

    def run(x, ids, axis):  # type: ignore[no-untyped-def]
        return nnx.merge(graph, params)(x, ids if packed else None, sequence_axis=axis)

    sharded = jax.shard_map(
        partial(run, axis="sequence"), mesh=mesh, in_specs=(along, along), out_specs=(along, whole), check_vma=False
    )
    out, state = jax.jit(sharded)(X, ids)
    expected, after = jax.jit(partial(run, axis=None))(X, ids)
    real = ids > 0 if packed else np.ones_like(ids, bool)
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=1e-6)
    for got, needed in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(got, needed, atol=1e-6)
