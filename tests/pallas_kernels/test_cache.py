"""The exact cache's kernel gives what the XLA path gives: the same rows kept, the same read, the same gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hola_jax.memory.cache_read import Masks, Visible, read_visible
from hola_jax.memory.exact_cache import Rows, cache_of_blocks
from pallas_kernels.cache import Cache, cached_read, empty_cache
from tests.pallas_kernels import tpus

B, H, KEY_HEADS, K, V, C, W = 2, 2, 1, 8, 6, 8, 4
T = 29  # three whole blocks and part of one


def case(dtype="float32", tokens=T, key_heads=KEY_HEADS, ties=False, seed=0):
    """Queries, keys, values, scores, sink logits."""
    draw = np.random.default_rng(seed)
    queries = jnp.asarray(draw.normal(size=(B, tokens, H, K)), dtype)
    keys = jnp.asarray(draw.normal(size=(B, tokens, key_heads, K)), dtype)
    values = jnp.asarray(draw.normal(size=(B, tokens, H, V)), dtype)
    scores = draw.integers(0, 3, size=(B, H, tokens)) if ties else draw.uniform(size=(B, H, tokens))
    return queries, keys, values, jnp.asarray(scores, jnp.float32), jnp.array([0.3, -0.5])


def held(dtype="float32", seed=1):
    """A cache of document 1 with an empty row, which a tie with new tokens touches."""
    draw = np.random.default_rng(seed)
    scores = jnp.asarray([2.0, 1.0, 1.0, -np.inf], jnp.float32)
    rows = [jnp.asarray(draw.normal(size=(B, H, W, x)), dtype).at[:, :, 3].set(0) for x in (K, V)]
    positions = jnp.broadcast_to(jnp.array([3, 1, 7, -1], jnp.int32), (B, H, W))
    return Cache(*rows, jnp.broadcast_to(scores, (B, H, W)), positions, jnp.ones(B, jnp.int32))


def packed(tokens=T):
    """Left padding and two documents; two documents, a gap in their ids, a change in mid-block, and right padding."""
    documents = np.ones((B, tokens), np.int32)
    documents[0, :5], documents[0, 20:] = 0, 2
    documents[1, 11:], documents[1, 26:] = 3, 0
    return jnp.asarray(documents)


def expected(queries, keys, values, scores, sink, cache, documents, start, window=W, energy=None):
    """The same by the XLA path: (read, cache after the whole blocks, positions after each block)."""
    tokens, key_heads = queries.shape[1], keys.shape[2]
    tail, group = -tokens % C, H // key_heads
    blocks = (tokens + tail) // C
    given = jnp.ones((B, tokens), jnp.int32) * jnp.maximum(cache.document, 1)[:, None]
    documents = jnp.pad(given if documents is None else documents, [(0, 0), (0, tail)])
    queries, keys, values = (jnp.pad(x, [(0, 0), (0, tail), (0, 0), (0, 0)]) for x in (queries, keys, values))
    scores = jnp.pad(scores, [(0, 0), (0, 0), (0, tail)])
    own = jnp.broadcast_to(jnp.arange(window, dtype=jnp.int32), cache.scores.shape)
    rows = cache_of_blocks(scores, documents, Rows(cache.document, cache.scores, own), C, "sequential")
    pools = [
        jnp.concatenate([old, jnp.repeat(new.swapaxes(1, 2), H // new.shape[2], axis=1)], axis=2)
        for old, new in ((cache.keys, keys), (cache.values, values))
    ]
    filled = rows.scores > -jnp.inf
    found = [
        jnp.where(filled[..., None], jnp.take_along_axis(x[None], rows.places[..., None], axis=3), 0) for x in pools
    ]

    def by_block(x):
        return x.reshape(B, blocks, C, key_heads, x.shape[2] // key_heads, x.shape[3]).swapaxes(0, 1)

    def apart(x):
        return x.reshape(*x.shape[:2], key_heads, group, *x.shape[3:])

    ids = documents.reshape(B, blocks, C).transpose(1, 0, 2)[:, :, None, None]
    same = (ids[..., :, None] == ids[..., None, :]) & (ids > 0)[..., None]
    masks = Masks(apart(filled[:-1, ..., None]), (ids == rows.document[:-1, :, None, None, None])[..., None, :], same)
    visible = Visible(*(apart(x[:-1]) for x in found), by_block(keys), by_block(values), sink.reshape(key_heads, group))
    out = read_visible(by_block(queries), visible, masks, energy).swapaxes(0, 1).reshape(B, -1, H, values.shape[3])
    start = jnp.zeros(B, jnp.int32) if start is None else start
    token_positions = start[:, None, None] + rows.places - window
    old = jnp.take_along_axis(cache.positions[None], jnp.minimum(rows.places, window - 1), axis=3)
    positions = jnp.where(filled, jnp.where(rows.places < window, old, token_positions), -1)
    whole = tokens // C
    after = Cache(found[0][whole], found[1][whole], rows.scores[whole], positions[whole], rows.document[whole])
    return out[:, :tokens], after, positions[1:].transpose(1, 2, 0, 3)[:, :, :whole]


@jax.jit
def kernel(arrays, cache=None, documents=None, start=None):
    return cached_read(*arrays, cache, documents=documents, start=start, window=W, block=C, interpret=True)


def close(actual, wanted, dtype="float32"):
    """bfloat16 rounds what is read once, and the softmax's weights: a few units in its last place, 2 ** -8."""
    tolerance = 2e-5 if dtype == "float32" else 3e-2
    actual, wanted = (np.asarray(x, np.float32) for x in (actual, wanted))
    np.testing.assert_allclose(actual, wanted, atol=tolerance, rtol=tolerance)


CASES = {
    "one document": {},
    "ties": {"ties": True},
    "fewer tokens than rows": {"tokens": 3},
    "whole blocks": {"tokens": 24},
    "documents": {"packed": True, "ties": True},
    "documents, bfloat16": {"packed": True, "dtype": "bfloat16"},
    "initial cache": {"held": True, "ties": True, "key_heads": 2},
    "initial cache of a document that ends": {"held": True, "packed": True},
}


def arguments(options):
    options = dict(options)
    tokens, dtype = options.get("tokens", T), options.get("dtype", "float32")
    documents = packed(tokens) if options.pop("packed", False) else None
    cache = held(dtype) if options.pop("held", False) else None
    start = None if cache is None else jnp.array([8, 16], jnp.int32)
    return case(**options), cache, documents, start, dtype


def by_kernel(queries, keys, values, scores, sink, *given):
    return kernel((queries, keys, values, scores, sink), *given)


@functools.cache
def gradient_of(call):
    """One program for all cases that differ in their numbers alone; the results beside the gradient."""

    def loss(queries, keys, values, sink, rows, scores, cache, documents, start):
        given = cache._replace(keys=rows[0], values=rows[1])
        out, after, chosen = call(queries, keys, values, scores, sink, given, documents, start)
        kept = jnp.sum(jnp.cos(after.keys.astype(jnp.float32))) + jnp.sum(after.values.astype(jnp.float32) ** 2)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + 0.1 * kept, (out, after, chosen)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))


@pytest.mark.parametrize("name", CASES)
def test_the_same_tokens_are_kept_the_same_is_read_and_the_gradient_is_the_same(name):
    """By everything that has a gradient, from what is read and from the cache that is left."""
    (queries, keys, values, scores, sink), cache, documents, start, dtype = arguments(CASES[name])
    cache = empty_cache(B, H, W, K, V, dtype) if cache is None else cache
    given = queries, keys, values, sink, (cache.keys, cache.values), scores, cache, documents, start
    gradient, (out, after, chosen) = gradient_of(by_kernel)(*given)
    wanted_gradient, (wanted, wanted_after, wanted_chosen) = gradient_of(expected)(*given)
    np.testing.assert_array_equal(chosen[:, :, : wanted_chosen.shape[2]], wanted_chosen)
    for field in ("keys", "values", "scores", "positions"):
        np.testing.assert_array_equal(getattr(after, field), getattr(wanted_after, field), err_msg=field)
    if documents is not None:
        np.testing.assert_array_equal(after.document, wanted_after.document)
    close(out, wanted, dtype)
    jax.tree.map(lambda a, b: close(a, b, dtype), gradient, wanted_gradient)


def test_a_continued_cache_is_the_whole():
    """Two calls, the second from the cache that the first gives back, read and keep what one call does."""
    arrays, _, documents, _, _ = arguments(CASES["documents"])
    queries, keys, values, scores, sink = arrays
    out, after, _ = kernel(arrays, None, documents)
    first = queries[:, :16], keys[:, :16], values[:, :16], scores[:, :, :16], sink
    second = queries[:, 16:], keys[:, 16:], values[:, 16:], scores[:, :, 16:], sink
    out1, between, _ = kernel(first, None, documents[:, :16])
    out2, again, _ = kernel(second, between, documents[:, 16:], jnp.full(B, 16, jnp.int32))
    np.testing.assert_array_equal(again.positions, after.positions)
    close(jnp.concatenate([out1, out2], axis=1), out)


def test_one_document_does_not_touch_another():
    """Bit for bit, in the read and in the gradient."""
    arrays, _, documents, _, _ = arguments(CASES["documents"])
    other = [jnp.where((documents == 1)[..., None, None], 3.0 - x, x) for x in arrays[:3]]

    def run(queries, keys, values):
        def read(values):
            out = kernel((queries, keys, values, *arrays[3:]), None, documents)[0]
            return jnp.where((documents > 1)[..., None, None], out, 0)

        return read(values), jax.grad(lambda v: jnp.sum(jnp.sin(read(v))))(values)

    for a, b in zip(run(*arrays[:3]), run(*other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dtype": "float16"}, TypeError, "float16; both must be"),
        ({"window": 0}, NotImplementedError, "window=0"),
        ({"key_dim": 96}, NotImplementedError, "K=96"),
        ({"block": 100}, NotImplementedError, "block=100"),
        ({"window": 2048}, NotImplementedError, "MiB on the chip"),
        ({"key_heads": 3}, ValueError, "h divides H"),
    ],
)
def test_what_cannot_run_is_refused_by_name(change, error, words):
    """Without being compiled, so also where there is no TPU."""
    sizes = {"dtype": "bfloat16", "window": 64, "block": 256, "key_dim": 64, "key_heads": 2} | change
    array = functools.partial(jax.ShapeDtypeStruct, dtype=sizes["dtype"])
    queries, keys = array((1, 512, 4, sizes["key_dim"])), array((1, 512, sizes["key_heads"], sizes["key_dim"]))
    scores, sink = jax.ShapeDtypeStruct((1, 4, 512), "float32"), jax.ShapeDtypeStruct((4,), "float32")
    call = functools.partial(cached_read, window=sizes["window"], block=sizes["block"])
    with pytest.raises(error, match=words):
        jax.eval_shape(call, queries, keys, array((1, 512, 4, 64)), scores, sink)


COMPILE = """
import functools
import jax, jax.numpy as jnp
from pallas_kernels.cache import cached_read

B, T, H = 8, 2048, 4

def read(queries, keys, values, scores, sink, documents, energy=None):
    return cached_read(
        queries, keys, values, scores, sink, documents=documents, window=64, block=256, energy=energy
    )[0]

def loss(*arrays):
    return jnp.sum(read(*arrays).astype(jnp.float32) ** 2)

def compiled(name, dtype, width, energy=None):
    here = jax.sharding.SingleDeviceSharding(chip(name))

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    tokens, scores = array(B, T, H, width), array(B, H, T, dtype="float32")
    arrays = tokens, tokens, tokens, scores, array(H, dtype="float32"), array(B, T, dtype="int32")
    if energy is None:  # the forward kernel asks for more where it keeps what backward wants
        calls = [jax.grad(loss, argnums=(0, 1, 2, 4))]
    else:
        calls = [functools.partial(read, energy=each) for each in (None, energy)]
    texts = [jax.jit(f).lower(*arrays).compile().as_text() for f in calls]
    return [text.count('custom_call_target="tpu_custom_call"') for text in texts]
"""
COMPILED = {
    "v5e": ("v5e:2x2", "bfloat16", 256),
    "forward alone, of all and of nine tenths": ("v5e:2x2", "bfloat16", 256, 0.9),
    "v5p": ("v5p:2x2x1", "bfloat16", 256),
    "v6e": ("v6e:2x2", "bfloat16", 256),
    "float32": ("v5e:2x2", "float32", 256),
    "keys of 64": ("v5e:2x2", "bfloat16", 64),
    "keys of 128": ("v5e:2x2", "bfloat16", 128),
}


@pytest.fixture(scope="module")
def kernels():
    return tpus.told(COMPILE, COMPILED)


@pytest.mark.slow
@tpus.needed
@pytest.mark.parametrize("name", COMPILED)
def test_the_kernels_compile_within_the_default_limit(name, kernels):
    assert kernels(name) == ([1, 1] if "alone" in name else [2])
