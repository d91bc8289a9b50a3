"""The GPU delta rule is the delta rule: simulated against XLA's, forward and gradients, and compiled for an H200."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from hola_jax.memory.delta_rule import delta_rule as plain
from hola_jax.memory.norms import unit_l2
from hola_jax.memory.reference_linear import linear_reference
from pallas_kernels.delta_rule.chunk import CHUNK
from pallas_kernels.delta_rule.gpu import delta_rule
from pallas_kernels.delta_rule.gpu.shapes import gates
from tests.pallas_kernels import h200

SCALE = 0.3
ROOT = Path(__file__).parents[2]
FORWARD = 1e-5  # keys are exact in bfloat16, and what meets them is in two parts: 2^-17, and float32's own rounding
BACKWARD = 2**-7  # gradients meet each other rounded to bfloat16
simulated = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams") or jax.__version_info__ < (0, 12),
    reason="the simulator of GPU kernels comes with jax 0.12",
)


def inputs(length, width=64, value_dim=64, heads=2, key_heads=1, batch=1, seed=0):
    """[q, k, v, beta, log_decay, initial]; two gates of each head are closed, one stands open."""
    draw = np.random.default_rng(seed)
    q, k = (jnp.asarray(draw.normal(size=(batch, length, key_heads, width)), jnp.bfloat16) for _ in range(2))
    v = jnp.asarray(draw.normal(size=(batch, length, heads, value_dim)), jnp.bfloat16)
    beta = draw.uniform(size=(batch, length, heads)).astype(np.float32)
    decay = -draw.uniform(size=(batch, length, heads)).astype(np.float32)
    for at, gate in ((3, -30.0), (length // 2, -1000.0), (length - 2, 0.0)):
        decay[:, at] = gate
    beta[:, 5], beta[:, 6] = 0.0, 1.0
    initial = jnp.asarray(draw.normal(size=(batch, heads, width, value_dim)), jnp.float32)
    return [q, k, v, jnp.asarray(beta), jnp.asarray(decay), initial]


def packed(length):
    """Left padding, two documents and a gap in their ids, right padding."""
    ids = np.ones((1, length), np.int32)
    ids[:, :2], ids[:, length // 3 :], ids[:, length - 4 :] = 0, 3, 0
    return jnp.asarray(ids)


def exact(q, k, v, *gates, normalise, **given):
    """XLA's delta rule in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q, k = (unit_l2(x) if normalise else x for x in (q, k))
    return plain(q, k, v, *gates, **given)


@functools.cache
def both(which, normalise, magnitude):
    """A program: the gradients of a nonlinear function of outputs and final state by every input; outputs, magnitudes and
    final state. One for all cases that differ in their numbers alone."""
    run = exact
    if which == "kernel":
        simulator = plgpu.InterpretGPUParams(detect_races=True)
        run = functools.partial(delta_rule, interpret=simulator, out_dtype="float32")

    def loss(arrays, given):
        *tokens, initial = arrays
        result = run(*tokens, scale=SCALE, initial=initial, normalise=normalise, magnitude=magnitude, **given)
        return jnp.sum(jnp.sin(result.out.astype(jnp.float32))) + jnp.sum(jnp.tanh(result.final)), result

    return jax.jit(jax.grad(loss, has_aux=True))


def close(actual, expected, tolerance, name=""):
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    assert np.isfinite(actual).all(), name
    size = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual, expected, atol=tolerance * size, rtol=tolerance, err_msg=name)


def agree(arrays, *, normalise, magnitude, **given):
    programs = (both(which, normalise, magnitude) for which in ("kernel", "xla"))
    (found, actual), (wanted, expected) = (run(arrays, given) for run in programs)
    close(actual.magnitude, expected.magnitude, FORWARD, "magnitude")
    close(actual.final, expected.final, FORWARD, "final")
    close(actual.out, expected.out, BACKWARD, "out")
    for name, a, b in zip(("q", "k", "v", "beta", "log_decay", "initial"), found, wanted, strict=True):
        assert a.dtype == b.dtype
        close(a, b, BACKWARD, name)


@simulated
def test_outputs_scores_state_and_gradients_are_those_of_xla():
    """Two documents behind padding, across a chunk's edge, in two heads that share their keys."""
    agree(inputs(70), normalise=True, documents=packed(70), initial_document=jnp.array([1]), magnitude="surprise")


@simulated
@pytest.mark.parametrize(("gate", "beta"), [(0.0, 1.0), (-50.0, 1.0), (-1e9, 0.0)])
def test_extreme_gates_repeated_keys_and_keys_of_zeros(gate, beta):
    q, k, v, *_, initial = inputs(60, heads=1)
    k = k.at[:, 10:40].set(k[:, 10:11]).at[:, 50:55].set(0.0)
    gate, beta = jnp.full((1, 60, 1), gate), jnp.full((1, 60, 1), beta)
    agree([q, k, v, beta, gate, initial], normalise=True, magnitude="surprise", initial_document=jnp.array([1]))


@simulated
def test_outputs_are_those_of_the_specification():
    *tokens, initial = inputs(20, heads=1)
    tokens[:2] = (unit_l2(x).astype(jnp.bfloat16) for x in tokens[:2])
    given = {"documents": packed(20), "initial": initial, "initial_document": jnp.array([1])}
    run = functools.partial(delta_rule, scale=SCALE, interpret=plgpu.InterpretGPUParams(), **given)
    actual = jax.jit(run)(*tokens)
    assert actual.out.dtype == jnp.bfloat16
    out, final = linear_reference(*(x.astype(jnp.float32) for x in tokens), SCALE, *given.values())
    close(actual.out, out, BACKWARD)
    close(actual.final, final, FORWARD)
    assert actual.magnitude is None


@simulated
@pytest.mark.slow
def test_two_warpgroups_share_what_keys_of_256_are():
    """In a process of its own: simulated warpgroups wait for each other, on a thread each, of which a host with few cores
    is given too few unless it is told otherwise before JAX starts."""
    run = "import tests.pallas_kernels.test_delta_rule_gpu as t; t.agree(t.inputs(70, 256, heads=1), normalise=True)"
    run = run.replace("normalise=True", "normalise=True, magnitude='residual'")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "8", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", run], env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_gates_of_one_document_hold_no_bit_of_another():
    draw = np.random.default_rng(0)
    beta, decay = (jnp.asarray(draw.uniform(size=(1, 70, 1)), jnp.float32) for _ in range(2))
    ids, none = packed(70), jnp.zeros(1, jnp.int32)
    first = (ids == 1)[..., None]
    before, after = (gates(beta, x, ids, none, 58) for x in (-decay, jnp.where(first, -9.0, -decay)))
    others = np.asarray(jnp.pad(ids, [(0, 0), (0, 58)])).reshape(1, 1, 2, CHUNK) == 3
    for name in ("coarse", "fine", "entering", "leaving"):
        a, b = (np.asarray(getattr(x, name)) for x in (before, after))
        np.testing.assert_array_equal(a[others], b[others])


def test_what_cannot_run_is_refused_by_name():
    q, k, v, beta, decay, _ = inputs(8)
    with pytest.raises(NotImplementedError, match="per key channel"):
        delta_rule(q, k, v, beta, jnp.zeros((*decay.shape, 64)), scale=1.0)
    with pytest.raises(NotImplementedError, match=r"K is 48; .* 64, 128 or 256"):
        delta_rule(q[..., :48], k[..., :48], v, beta, decay, scale=1.0)
    with pytest.raises(NotImplementedError, match="V is 32"):
        delta_rule(q, k, v[..., :32], beta, decay, scale=1.0)
    with pytest.raises(NotImplementedError, match=r"q is float32; .* bfloat16"):
        delta_rule(q.astype("float32"), k, v, beta, decay, scale=1.0)
    with pytest.raises(NotImplementedError, match="out_dtype is float16"):
        delta_rule(q, k, v, beta, decay, scale=1.0, out_dtype="float16")
    with pytest.raises(ValueError, match="beta is"):
        delta_rule(q, k, v, beta[:, 1:], decay, scale=1.0)


@pytest.mark.slow
@pytest.mark.skipif(h200.missing() is not None, reason=str(h200.missing()))
@pytest.mark.parametrize("width", [64, 128, 256])
def test_forward_and_backward_compile_for_an_h200_at_the_340m_shapes(width):
    """The compiler refuses what shared memory cannot hold."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    script = Path(__file__).with_name("compile_delta_rule_gpu.py")
    ran = subprocess.run([sys.executable, script, str(width)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    temporary = {line.split()[1]: int(line.split()[-1]) for line in ran.stdout.splitlines()}
    assert temporary["forward"] < 256 * 2**20
    assert temporary["both"] < 640 * 2**20  # states and their gradients, of 64 MiB each, among them
