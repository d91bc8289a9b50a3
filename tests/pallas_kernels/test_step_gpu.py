"""One token by the GPU's kernels is one token of the memory, under the interpreter; they compile for an H200, in place."""

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
from hola_jax.memory import CacheParams, MemoryConfig, hola_memory
from hola_jax.memory.exact_cache import magnitude_kind, token_scores
from pallas_kernels.hola import Learned
from pallas_kernels.step import Memory
from pallas_kernels.step.gpu import step
from tests.laws.cases import assert_close
from tests.pallas_kernels import h200, test_step

ROOT = Path(__file__).parents[2]
B, H, K, V = 2, 2, 64, 64
CONFIG = MemoryConfig(window=64, block=64, chunk=32)
PARAMS = CacheParams(
    jnp.linspace(0.8, 1.3, K), jnp.linspace(1.2, 0.7, K), jnp.array([0.3, -0.5]), jnp.array([0.5, -1.0])
)
PREFIX = 62
# A block ends, a document begins and ends a block of its own with the next; padding in the midst.
DOCUMENTS = np.array([[1, 1, 1, 2], [1, 0, 1, 3]], np.int32)
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the GPU kernels are written for jax 0.11 and newer"
)


def inputs(seed, tokens, key_heads):
    """q, k, v in bfloat16, beta, log_decay."""
    draw = np.random.default_rng(seed)
    q, k = (jnp.asarray(draw.normal(size=(B, tokens, key_heads, K)), "bfloat16") for _ in range(2))
    v = jnp.asarray(draw.normal(size=(B, tokens, H, V)), "bfloat16")
    gates = [jnp.asarray(x, jnp.float32) for x in draw.uniform(size=(2, B, tokens, H))]
    return [q, k, v, gates[0], -0.3 * gates[1]]


@functools.cache
def plain(config):
    return jax.jit(functools.partial(hola_memory, config=config, implementation="xla"))


def prefix(config, key_heads):
    """The memory behind some tokens: row 1 stands one token further from its block's end."""
    documents = np.ones((B, PREFIX), np.int32)
    documents[1, 0] = 0
    return plain(config)(*inputs(1, PREFIX, key_heads), PARAMS, segment_ids=documents)[1]


@functools.cache
def kernel(config):
    """A token by the kernels: (arrays [B, 1, ...], documents [B], memory) -> (out, memory)."""
    learned = Learned(
        PARAMS.query_scale * K**-0.5, PARAMS.key_scale, PARAMS.sink_logit, jax.nn.sigmoid(PARAMS.gate_logit)
    )

    @jax.jit
    def run(arrays, documents, memory):
        q, k, v, beta, decay = (x[:, 0] for x in arrays)
        score = magnitude_kind(config) or token_scores(config, None, v, beta, memory.position)
        interpret = plgpu.InterpretGPUParams(detect_races=True)
        options = {"scale": config.scale(K), "score": score, "interpret": interpret}
        return step(q, k, v, beta, decay, learned, memory, documents, **options)

    return run


CASES = {
    "a key head each": (CONFIG, 2),
    "heads that share their keys, a score given": (MemoryConfig(window=64, block=64, chunk=32, score="write"), 1),
}


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_token_by_token_it_is_the_memory_and_nothing_races(name, capfd):
    """Answers, kept tokens and everything else that is remembered, after each token."""
    config, key_heads = CASES[name]
    state = prefix(config, key_heads)
    memory, arrays = test_step.memory_of(state), inputs(2, DOCUMENTS.shape[1], key_heads)
    for at in range(DOCUMENTS.shape[1]):
        token, documents = [x[:, at : at + 1] for x in arrays], DOCUMENTS[:, at]
        wanted, state = plain(config)(*token, PARAMS, segment_ids=documents[:, None], state=state)
        out, memory = kernel(config)(token, documents, memory)
        # bfloat16 rounds the softmax's weights of the other and the answers of both: units in their last place, 2 ** -8.
        assert_close(out, wanted[:, 0], 3e-2, f"answer to token {at}")
        for field, a, b in zip(Memory._fields, memory, test_step.memory_of(state), strict=True):
            assert a.dtype == b.dtype
            if a.dtype == jnp.int32:
                np.testing.assert_array_equal(a, b, err_msg=f"{field} after token {at}")
            else:
                assert_close(a, b, 2e-5, f"{field} after token {at}")
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@interpreted
@pytest.mark.parametrize("where", ["state", "q", "k", "v", "beta", "log_decay"])
def test_what_is_not_finite_spoils_its_row_and_head_until_another_document(where):
    """One number of S or of a token in row 0 and head 1. A query spoils its answer alone."""
    state = prefix(CONFIG, 2)
    memory, arrays = test_step.memory_of(state), inputs(3, 3, 2)
    tokens = [[x[:, at : at + 1] for x in arrays] for at in range(3)]
    bad, first = memory, list(tokens[0])
    if where == "state":
        bad = memory._replace(fast_weights=memory.fast_weights.at[0, 1, 5, 40].set(jnp.inf))
    else:
        which = ["q", "k", "v", "beta", "log_decay"].index(where)
        flat = first[which].reshape(B, H, -1).at[0, 1, -1].set(jnp.nan)
        first[which] = flat.reshape(first[which].shape)
    for at, token in enumerate((first, tokens[1])):
        clean_out, memory = kernel(CONFIG)(tokens[at], jnp.ones(B, jnp.int32), memory)
        out, bad = kernel(CONFIG)(token, jnp.ones(B, jnp.int32), bad)
        assert np.isnan(np.asarray(out[0, 1], np.float32)).all() == (at == 0 or where != "q")
        assert np.isfinite(bad.fast_weights[0, 1]).all() == (where == "q")
        rest = (bad.cache_values, bad.block_keys, bad.block_values, bad.block_scores)
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in rest)
        for a, b in ((out, clean_out), (bad.fast_weights, memory.fast_weights), (bad.cache_keys, memory.cache_keys)):
            np.testing.assert_array_equal(a[1], b[1])
            np.testing.assert_array_equal(a[0, 0], b[0, 0])
    out, bad = kernel(CONFIG)(tokens[2], jnp.array([7, 1]), bad)
    assert np.isfinite(np.asarray(out, np.float32)).all() and np.isfinite(bad.fast_weights).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dtype": "float32"}, NotImplementedError, "v is float32: the GPU step takes a bfloat16 cache"),
        ({"window": 0}, NotImplementedError, "window=0"),
        ({"window": 1024}, NotImplementedError, "window=1024: .* multiple of 64 up to 512"),
        ({"width": 96}, NotImplementedError, "K=96"),
        ({"block": 100}, NotImplementedError, "block=100"),
        ({"key_heads": 3}, ValueError, "must divide"),
    ],
)
def test_what_cannot_run_is_refused_by_name(change, error, words):
    """Without being compiled, so also where there is no GPU."""
    with pytest.raises(error, match=words):
        jax.eval_shape(functools.partial(step, scale=1.0), *test_step.shapes(**change))


COMPILE = """
import functools, sys
import jax
from pallas_kernels.step.gpu import step
from tests.pallas_kernels.h200 import topology
from tests.pallas_kernels.test_step import shapes

width, window, key_heads = (int(x) for x in sys.argv[1:])
place = jax.sharding.SingleDeviceSharding(topology())
arrays = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes(width, window=window, key_heads=key_heads)
)
compiled = jax.jit(functools.partial(step, scale=1.0), donate_argnums=6).lower(*arrays).compile()
text, memory = compiled.as_text(), compiled.memory_analysis()
assert text.count('custom_call_target="mosaic_gpu') == 2, text
assert "conditional(" not in text  # which the host would wait for
large = sum(x.size * x.dtype.itemsize for x in arrays[6] if len(x.shape) == 4)
assert memory.alias_size_in_bytes >= large, (memory.alias_size_in_bytes, large)
assert memory.temp_size_in_bytes < large // 16, memory.temp_size_in_bytes
"""


@pytest.mark.slow
@pytest.mark.skipif(h200.missing() is not None, reason=str(h200.missing()))
@pytest.mark.parametrize(("width", "window", "key_heads"), [(256, 64, 4), (128, 256, 2), (64, 64, 4)])
def test_the_kernels_compile_for_an_h200_in_place_and_spill_nothing(width, window, key_heads, tmp_path):
    """In a process of its own: the plugin is kept from this one. Spills are seen where the CUDA toolkit's assembler is
    found."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment |= {"MOSAIC_GPU_DUMP_TO": os.fspath(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(width), str(window), str(key_heads)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("hola_step_token", "hola_step_evict"):
        told = gpu_compile.assembled(tmp_path, name, shutil.which("ptxas"))
        assert told.shared is not None and told.shared <= 227 * 1024
        assert told.spilled in (0, None), (name, told)
