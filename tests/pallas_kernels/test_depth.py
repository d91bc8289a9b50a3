"""The look over depth by the kernels is that of plain XLA, forward and backward; and it compiles for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hola_jax.layers.depth_reads import Looks, Part, begun, ended, join, look_along
from hola_jax.memory.kernels import depth_kernels
from pallas_kernels.depth import look, look_back, tpu_refuses
from tests.pallas_kernels import tpus
from tests.train.small import tiny
from train.layout import Layout
from train.mesh import MeshConfig, make_mesh

EPSILON = 1e-6
S, B = 4, 2


@functools.cache
def arrays(tokens, dim, dtype, readers=2):
    draw = np.random.default_rng(0)
    sources = jnp.asarray(draw.normal(size=(S, B, tokens, dim)) * [[[[1]]], [[[3]]], [[[0.1]]], [[[1]]]], dtype)
    directions = jnp.asarray(draw.normal(size=(readers, dim)) / 2, jnp.float32)
    found = [draw.normal(size=size) for size in ((readers, B, tokens), (readers, B, tokens, dim), sources.shape)]
    return directions, sources, found


@pytest.mark.parametrize(("tokens", "dtype"), [(64, "float32"), (12, "float32"), (32, "bfloat16")])
def test_the_kernels_look_as_plain_xla_does(tokens, dtype):
    """What is found, and the gradient by directions and by sources, with what later looks add to it, at any count."""
    directions, sources, (by_mass, by_total, by_sources) = arrays(tokens, 32, dtype)
    kernels, _ = depth_kernels("interpret", 2, tokens, 32, dtype)
    assert kernels is not None

    @functools.partial(jax.jit, static_argnums=0)
    def run(looks, directions, sources, number):
        def loss(directions, sources):
            parts, trail = look_along(directions, begun(sources), number, looks)
            parts = ended(trail, parts)
            loss = jnp.sum(trail.sources * by_sources)
            for part, mass, total in zip(parts, by_mass, by_total, strict=True):
                loss += jnp.sum(part.mass * mass) + jnp.sum(part.total * total)
            return loss, parts

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(directions, sources)

    tolerance = 1e-5 if dtype == "float32" else 2.0**-7
    ways = [Looks(tuple(range(1, S + 1)), EPSILON, each) for each in (kernels, None)]
    for number in range(S):
        found, expected = (run(way, directions, sources, jnp.int32(number)) for way in ways)
        for ours, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            ours, plain = np.asarray(ours, np.float64), np.asarray(plain, np.float64)
            np.testing.assert_allclose(ours, plain, atol=tolerance * np.abs(plain).max())


@pytest.mark.parametrize(("own", "dtype"), [(1, "float32"), (2, "bfloat16")])
def test_a_reader_joins_as_by_plain_xla(own, dtype):
    """The gradient by all that goes in but the largest logit, which is a constant."""
    directions, sources, (_, by_total, _) = arrays(64, 32, dtype)
    draw = np.random.default_rng(1)
    top, mass = (jnp.asarray(1 + draw.random((B, 64)), jnp.float32) for _ in range(2))
    kernels, _ = depth_kernels("interpret", 2, 64, 32, dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(kernels, direction, mass, total, own):
        def loss(direction, mass, total, own):
            return jnp.sum(join(direction, Part(top, mass, total), own, EPSILON, kernels) * by_total[0])

        return jax.grad(loss, argnums=range(4))(direction, mass, total, own)

    given = directions[0], mass, sources[0], tuple(sources[1 : 1 + own])
    tolerance = 1e-5 if dtype == "float32" else 2.0**-7
    for ours, plain in zip(*(jax.tree.leaves(gradient(each, *given)) for each in (kernels, None)), strict=True):
        ours, plain = np.asarray(ours, np.float64), np.asarray(plain, np.float64)
        np.testing.assert_allclose(ours, plain, atol=tolerance * np.abs(plain).max())


def test_sources_to_come_are_not_read():
    """Nor changed: what lies in their places may be anything."""
    directions, sources, (by_mass, by_total, _) = arrays(32, 32, "float32")
    spoilt = sources.at[2:].set(jnp.nan)
    run = functools.partial(look, epsilon=EPSILON, interpret=True)
    found, expected = (jax.jit(run)(directions, x, jnp.int32(2)) for x in (spoilt, sources))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    given = jnp.asarray(by_mass, jnp.float32), tuple(jnp.asarray(by_total, jnp.float32))
    back = jax.jit(functools.partial(look_back, epsilon=EPSILON, interpret=True))
    turned, change = back(directions, spoilt, jnp.int32(2), found.tops, *given, spoilt.at[:2].set(0))
    assert np.isfinite(turned).all() and np.isfinite(change[:2]).all() and np.isnan(change[2:]).all()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((4, 2048, 512, "float16"), "float16"),
        ((4, 100, 512, "bfloat16"), "T=100, dim=512"),
        ((4, 2048, 96, "bfloat16"), "T=2048, dim=96"),
        ((48, 2048, 4096, "bfloat16"), "48 readers of dim=4096 need about"),
    ],
)
def test_what_cannot_run_is_named(sizes, words):
    assert words in tpu_refuses(*sizes)
    assert not tpu_refuses(4, 2048, 512, "bfloat16") and not tpu_refuses(4, 2048, 1024, "float32")


def test_kernels_run_where_the_memorys_do():
    """Of a platform that is not here, as the trainer asks, and of this one."""
    sizes = (4, 2048, 512, "bfloat16")
    run, why = depth_kernels("pallas_tpu", *sizes, parts=1)
    assert run is not None and "take this shape" in why
    for name, parts, words in [
        ("xla", 1, "where the memory runs by xla"),
        ("pallas_gpu", 1, "where the memory runs by pallas_gpu"),
        ("pallas_tpu", 2, "a mesh axis is left to the compiler"),
    ]:
        run, why = depth_kernels(name, *sizes, parts=parts)
        assert run is None and words in why, why


def test_a_run_says_by_what_its_readers_look():
    def said(**fields):
        return Layout(tiny(**fields), make_mesh(MeshConfig(), jax.devices()[:1])).over_depth(64)

    assert said() == ""
    assert (
        said(residual="attention", implementation="interpret")
        == "readers over depth by kernels: kernels take this shape"
    )
    assert "by xla: there are no kernels for them" in said(residual="block_attention")


COMPILED = """
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from pallas_kernels.depth import join_back, look, look_back

def compiled(topology, readers, dim, dtype):
    place = SingleDeviceSharding(chip(topology))
    def array(*sizes, dtype="float32"):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)
    sources, rows = array(5, 2, 1024, dim, dtype=dtype), array(readers, 2, 1024)
    directions, wide = array(readers, dim), array(2, 1024, dim, dtype=dtype)
    totals = (wide,) * readers
    count = array(dtype="int32")
    def forward(*given):
        return look(*given, epsilon=1e-6)
    def backward(*given):
        return look_back(*given, epsilon=1e-6)
    def join(*given):
        return join_back(*given, epsilon=1e-6)
    jax.jit(join).lower(array(dim), (wide,) * (readers - 1), wide, array(2, 1024), array(2, 1024), wide).compile()
    jax.jit(forward).lower(directions, sources, count).compile()
    back = jax.jit(backward, donate_argnums=6).lower(directions, sources, count, rows, rows, totals, sources).compile()
    return back.memory_analysis().temp_size_in_bytes / (sources.size * sources.dtype.itemsize)
"""
CHIPS = {
    "v5e": ("v5e:2x2", 4, 512, "bfloat16"),
    "v5e, float32": ("v5e:2x2", 8, 512, "float32"),
    "v5p": ("v5p:2x2x1", 6, 1024, "bfloat16"),
    "v6e": ("v6e:2x2", 4, 1024, "bfloat16"),
}


@pytest.fixture(scope="module")
def compiled():
    return tpus.told(COMPILED, CHIPS)


@tpus.needed
@pytest.mark.slow
@pytest.mark.parametrize("name", CHIPS)
def test_it_compiles_for_tpus_and_adds_in_place(name, compiled):
    """Beside its arguments it holds no copy of the sources."""
    assert compiled(name) < 0.5
