"""The exact cache's GPU kernels give what the XLA path gives, under the interpreter; and they compile for an H200."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks import gpu_compile
from pallas_kernels.cache import Cache, empty_cache
from pallas_kernels.cache.gpu import cached_read
from pallas_kernels.cache.gpu.choice import along_stay, found_by_blocks, positions_of, slots_entered
from tests.pallas_kernels import h200, test_cache

ROOT = Path(__file__).parents[2]
B, H, K, V, C = 1, 2, 64, 64, 64  # a warpgroup multiplies 64 rows
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the GPU kernels are written for jax 0.11 and newer"
)


@pytest.fixture
def sizes(monkeypatch):
    """The XLA path's helpers of the TPU kernel's tests, at sizes that tensor cores take."""

    def set_sizes(window, block=C):
        for name, size in {"B": B, "H": H, "K": K, "V": V, "C": block, "W": window}.items():
            monkeypatch.setattr(test_cache, name, size)

    return set_sizes


def case(tokens, key_heads, seed=0):
    queries, keys, values, scores, sink = test_cache.case("bfloat16", tokens, key_heads, ties=True, seed=seed)
    return 0.3 * queries, 0.5 * keys, values, scores, sink


def held(window):
    """A cache of document 1 with three rows, two of them equal; the rest is empty."""
    draw, there = np.random.default_rng(1), np.arange(window) < 3
    rows = [jnp.asarray(np.where(there[:, None], draw.normal(size=(B, H, window, x)), 0), "bfloat16") for x in (K, V)]
    scores, positions = np.full(window, -np.inf, np.float32), np.full(window, -1, np.int32)
    scores[:3], positions[:3] = (2, 1, 1), (3, 1, 7)
    many = [jnp.broadcast_to(jnp.asarray(x), (B, H, window)) for x in (scores, positions)]
    return Cache(*rows, *many, jnp.ones(B, jnp.int32))


def packed(tokens):
    """Left padding, two documents with a gap in their ids and a change in mid-block, right padding."""
    documents = np.ones((B, tokens), np.int32)
    documents[:, :5], documents[:, tokens // 2 + 7 :], documents[:, tokens - 4 :] = 0, 3, 0
    return jnp.asarray(documents)


def with_gradient(call, arrays, cache, documents, start):
    """By everything that has a gradient, from what is read and from the cache that is left; then the results."""
    queries, keys, values, scores, sink = arrays

    def loss(queries, keys, values, sink, rows):
        given = None if rows is None else cache._replace(keys=rows[0], values=rows[1])
        out, after, chosen = call(queries, keys, values, scores, sink, given, documents, start)
        kept = jnp.sum(jnp.cos(after.keys.astype(jnp.float32))) + jnp.sum(after.values.astype(jnp.float32) ** 2)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + 0.1 * kept, (out, after, chosen)

    rows = None if cache is None else (cache.keys, cache.values)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))(queries, keys, values, sink, rows)


def kernel(window, block):
    interpret = plgpu.InterpretGPUParams(detect_races=True)

    def call(queries, keys, values, scores, sink, cache, documents, start):
        given = {"documents": documents, "start": start, "window": window, "block": block, "interpret": interpret}
        return cached_read(queries, keys, values, scores, sink, cache, **given)

    return call


CASES = {
    "two warpgroups to a block": {"tokens": 128, "key_heads": 2, "window": 8, "block": 128},
    "documents, a cache, shared keys, a window of no whole tiles": {
        "tokens": 150,
        "key_heads": 1,
        "window": 70,
        "packed": True,
        "held": True,
    },
}


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("name", CASES)
def test_the_same_tokens_are_kept_the_same_is_read_the_gradient_is_the_same_and_nothing_races(name, sizes, capfd):
    options = CASES[name]
    tokens, window, block = options["tokens"], options["window"], options.get("block", C)
    sizes(window, block)
    arrays = case(tokens, options["key_heads"])
    documents = packed(tokens) if "packed" in options else None
    cache, start = (held(window), jnp.full(B, block, jnp.int32)) if "held" in options else (None, None)
    gradient, (out, after, chosen) = with_gradient(kernel(window, block), arrays, cache, documents, start)
    given = empty_cache(B, H, window, K, V, "bfloat16") if cache is None else cache

    def expected(*arguments):
        return test_cache.expected(*arguments, window=window)

    wanted_gradient, (wanted, wanted_after, wanted_chosen) = with_gradient(expected, arrays, given, documents, start)
    np.testing.assert_array_equal(chosen[:, :, : wanted_chosen.shape[2]], wanted_chosen)
    for field in ("keys", "values", "scores", "positions"):
        np.testing.assert_array_equal(getattr(after, field), getattr(wanted_after, field), err_msg=field)
    test_cache.close(out, wanted, "bfloat16")
    if cache is None:
        gradient, wanted_gradient = gradient[:4], wanted_gradient[:4]
    jax.tree.map(lambda a, b: test_cache.close(a, b, "bfloat16"), gradient, wanted_gradient)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@interpreted
def test_two_warpgroups_of_queries_read_what_one_does(sizes, capfd):
    """A block of 128 tokens is read by two warpgroups, the first of which leaves the last tile to the other."""
    sizes(8)
    queries, keys, values, scores, sink = case(128, 2)
    arrays = queries[:, :, :1], keys[:, :, :1], values[:, :, :1], scores[:, :1], sink[:1]
    given = {"window": 8, "block": 128, "interpret": plgpu.InterpretGPUParams(detect_races=True)}
    out = jax.jit(functools.partial(cached_read, **given))(*arrays)[0]
    logits = jnp.einsum("tk,sk->ts", *(x[0, :, 0].astype(jnp.float32) for x in (queries, keys)))
    logits = jnp.where(jnp.arange(128) <= jnp.arange(128)[:, None], logits, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([jnp.full((128, 1), sink[0]), logits], axis=1))
    test_cache.close(out[0, :, 0], weights[:, 1:] @ values[0, :, 0].astype(jnp.float32), "bfloat16")
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def chosen_by_hand(scores, documents, window, block):
    """Positions after each whole block: by a sort of all earlier tokens of the last document."""
    kept = []
    for end in range(block, len(scores) + 1, block):
        latest = documents[:end].max()
        living = [t for t in range(end) if documents[t] == latest and latest > 0]
        best = sorted(living, key=lambda t: (-scores[t], t))[:window]
        kept.append(best + [-1] * (window - len(best)))
    return kept


@pytest.mark.parametrize("window", [3, 8])
def test_the_choice_is_a_sort_of_all_earlier_tokens_of_the_document(window):
    """With ties, documents, a window beyond the block, and a row that is whole for two blocks of four only."""
    block, tokens = 5, 20
    draw = np.random.default_rng(0)
    scores = draw.integers(0, 4, size=(2, 2, tokens)).astype(np.float32)
    documents = np.sort(draw.integers(0, 4, size=(2, tokens)), axis=1).astype(np.int32)
    whole = jnp.array([4, 2], jnp.int32)
    cache = empty_cache(2, 2, window, 1, 1, "bfloat16")
    found = jax.jit(lambda s, d: found_by_blocks(s, d, whole, cache, block))(scores, documents)
    positions = positions_of(found, cache.positions, jnp.zeros(2, jnp.int32))[:, :, 1:]
    for b in range(2):
        for h in range(2):
            wanted = chosen_by_hand(scores[b, h], documents[b], window, block)
            wanted = [wanted[min(i, int(whole[b]) - 1)] for i in range(4)]
            np.testing.assert_array_equal(positions[b, h], wanted)
    entered = np.asarray(slots_entered(found, block))[0, 0]
    for i in range(4):
        for c in range(block):
            slot = entered[i, c]
            assert (i * block + c in positions[0, 0, i]) == (slot >= 0)
            assert slot < 0 or positions[0, 0, i, slot] == i * block + c


def test_a_rows_gradient_is_summed_over_all_caches_that_hold_it():
    """20 blocks: more caches than one round sums."""
    block, blocks, window = 4, 20, 6
    scores = np.random.default_rng(0).uniform(size=(1, 1, blocks * block)).astype(np.float32)
    cache = empty_cache(1, 1, window, 1, 1, "bfloat16")
    found = jax.jit(lambda s: found_by_blocks(s, None, jnp.array([blocks]), cache, block))(scores)
    said = np.random.default_rng(1).normal(size=(1, 1, blocks + 1, window, 3)).astype(np.float32)
    sums = jax.jit(along_stay)(said, found)[0, 0]
    places, filled = np.asarray(found.places)[0, 0], np.asarray(found.scores)[0, 0] > -np.inf
    for m in range(blocks + 1):
        for j in np.flatnonzero(filled[m]):
            held = [said[0, 0, n, filled[n] & (places[n] == places[m, j])].sum(0) for n in range(m, blocks + 1)]
            np.testing.assert_allclose(sums[m, j], np.sum(held, axis=0), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dtype": "float16"}, TypeError, "float16; both must be"),
        ({"dtype": "float32"}, NotImplementedError, "float32: the GPU kernel's"),
        ({"window": 0}, NotImplementedError, "window=0"),
        ({"window": 2048}, NotImplementedError, "window=2048"),
        ({"key_dim": 96}, NotImplementedError, "K=96"),
        ({"block": 100}, NotImplementedError, "block=100"),
        ({"key_heads": 3}, ValueError, "h divides H"),
    ],
)
def test_what_cannot_run_is_refused_by_name(change, error, words):
    """Without being compiled, so also where there is no GPU."""
    sizes = {"dtype": "bfloat16", "window": 64, "block": 256, "key_dim": 64, "key_heads": 2} | change
    array = functools.partial(jax.ShapeDtypeStruct, dtype=sizes["dtype"])
    queries, keys = array((1, 512, 4, sizes["key_dim"])), array((1, 512, sizes["key_heads"], sizes["key_dim"]))
    scores, sink = jax.ShapeDtypeStruct((1, 4, 512), "float32"), jax.ShapeDtypeStruct((4,), "float32")
    call = functools.partial(cached_read, window=sizes["window"], block=sizes["block"])
    with pytest.raises(error, match=words):
        jax.eval_shape(call, queries, keys, array((1, 512, 4, 64)), scores, sink)


KERNELS = "hola_cache_forward", "hola_cache_by_queries", "hola_cache_by_entries"
COMPILE = """
import sys
import jax, jax.numpy as jnp
from pallas_kernels.cache.gpu import cached_read
from tests.pallas_kernels.h200 import topology

width, window = int(sys.argv[1]), int(sys.argv[2])
place = jax.sharding.SingleDeviceSharding(topology())
B, T, H = 8, 2048, 4

def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

def loss(queries, keys, values, scores, sink, documents):
    out = cached_read(queries, keys, values, scores, sink, documents=documents, window=window, block=256)[0]
    return jnp.sum(out.astype(jnp.float32) ** 2)

tokens, scores = array(B, T, H, width), array(B, H, T, dtype="float32")
arrays = tokens, tokens, tokens, scores, array(H, dtype="float32"), array(B, T, dtype="int32")
text = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 4))).lower(*arrays).compile().as_text()
assert text.count('custom_call_target="mosaic_gpu') == 3, text
assert "scatter(" not in text  # nothing is added up by atomics
"""


@pytest.mark.slow
@pytest.mark.skipif(h200.missing() is not None, reason=str(h200.missing()))
@pytest.mark.parametrize(("width", "window"), [(256, 64), (128, 64), (64, 256)])
def test_the_kernels_compile_for_an_h200_and_spill_nothing(width, window, tmp_path):
    """In a process of its own: the plugin is kept from this one. Shared memory above what a chip has is an error here.
    Spills are seen where the CUDA toolkit's assembler is found."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment |= {"MOSAIC_GPU_DUMP_TO": os.fspath(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(width), str(window)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in KERNELS:
        told = gpu_compile.assembled(tmp_path, name, shutil.which("ptxas"))
        assert told.shared is not None and told.shared <= 227 * 1024
        assert told.spilled in (0, None), (name, told)
