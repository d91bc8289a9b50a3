"""The Pallas delta rule is the delta rule: interpreted against XLA's, forward and gradients, and compiled for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from hola_jax.memory.delta_rule import delta_rule as plain
from hola_jax.memory.norms import unit_l2
from hola_jax.memory.reference_linear import linear_reference
from pallas_kernels.delta_rule import delta_rule
from tests.pallas_kernels import tpus

SCALE = 0.3


def inputs(length, key_dim=16, value_dim=32, heads=2, key_heads=1, batch=2, dtype="float32", seed=0):
    """[q, k, v, beta, log_decay, initial]; two gates of each head are closed, one stands open."""
    draw = np.random.default_rng(seed)
    q, k = (unit_l2(jnp.asarray(draw.normal(size=(batch, length, key_heads, key_dim)))) for _ in range(2))
    v = jnp.asarray(draw.normal(size=(batch, length, heads, value_dim)), dtype)
    beta = draw.uniform(size=(batch, length, heads)).astype(np.float32)
    decay = -draw.uniform(size=(batch, length, heads)).astype(np.float32)
    for at, gate in ((3, -30.0), (length // 2, -1000.0), (length - 2, 0.0)):
        decay[:, at] = gate
    beta[:, 5], beta[:, 6] = 0.0, 1.0
    initial = jnp.asarray(draw.normal(size=(batch, heads, key_dim, value_dim)), jnp.float32)
    return [q.astype(dtype), k.astype(dtype), v, jnp.asarray(beta), jnp.asarray(decay), initial]


def documents(length):
    """Two documents behind left padding, across a chunk's edge; an id's gap and right padding."""
    ids = np.ones((2, length), np.int32)
    ids[0, :5], ids[0, length * 2 // 3 :] = 0, 2
    ids[1, 11:], ids[1, length - 7 :] = 3, 0
    return jnp.asarray(ids)


@functools.cache
def gradient_of(run):
    """One program for all cases that differ in their numbers alone."""

    def loss(arrays, options):
        *tokens, initial = arrays
        found = run(*tokens, scale=SCALE, initial=initial, **options)
        return jnp.sum(jnp.sin(found.out.astype(jnp.float32))) + jnp.sum(jnp.tanh(found.final))

    return jax.jit(jax.grad(loss))


def gradients(run, arrays, **options):
    """Gradients of a nonlinear function of outputs and final state, by every input."""
    return gradient_of(run)(arrays, options)


interpreted = functools.partial(delta_rule, interpret=True)


def close(actual, expected, tolerance, name=""):
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    size = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual, expected, atol=tolerance * size, rtol=tolerance, err_msg=name)


CASES = [
    (160, 16, 32, 1, None, "float32", "surprise"),
    (97, 64, 16, 2, "packed", "bfloat16", "residual"),
    (150, 32, 64, 2, "packed", "float32", "residual"),
    (13, 16, 16, 1, "packed", "float32", "surprise"),
]


@pytest.mark.parametrize(("length", "key_dim", "value_dim", "key_heads", "packed", "dtype", "kind"), CASES)
def test_outputs_state_and_gradients_are_those_of_xla(length, key_dim, value_dim, key_heads, packed, dtype, kind):
    *tokens, initial = arrays = inputs(length, key_dim, value_dim, key_heads=key_heads, dtype=dtype)
    options = {"initial_document": jnp.array([1, 0])}
    if packed:
        options["documents"] = documents(length)
    kernel = functools.partial(delta_rule, interpret=True, out_dtype="float32")
    given = {"scale": SCALE, "initial": initial, "magnitude": kind, **options}
    actual, expected = (jax.jit(functools.partial(run, **given))(*tokens) for run in (kernel, plain))
    for name in ("out", "magnitude", "final"):
        close(getattr(actual, name), getattr(expected, name), 1e-5, name)
    actual, expected = (gradients(run, arrays, **options) for run in (kernel, plain))
    for name, a, b in zip(("q", "k", "v", "beta", "log_decay", "initial"), actual, expected, strict=True):
        assert a.dtype == b.dtype
        close(a, b, 3e-5 if a.dtype == jnp.float32 else 2**-7, name)


def test_outputs_are_those_of_the_specification():
    length = 70
    *tokens, initial = inputs(length)
    ids, document = documents(length), jnp.array([1, 1])
    given = {"scale": SCALE, "documents": ids, "initial": initial, "initial_document": document}
    actual = jax.jit(functools.partial(interpreted, **given))(*tokens)
    out, final = linear_reference(*tokens, SCALE, ids, initial, document)
    close(actual.out, out, 2e-5)
    close(actual.final, final, 2e-5)


@pytest.mark.parametrize(("gate", "beta"), [(0.0, 1.0), (-50.0, 1.0), (-1e9, 0.0)])
def test_extreme_gates_repeated_keys_and_keys_of_zeros(gate, beta):
    length = 80
    q, k, v, *_, initial = inputs(length, key_heads=2)
    k = k.at[:, 10:60].set(k[:, 10:11]).at[:, 70:75].set(0.0)
    gates = jnp.full((2, length, 2), beta), jnp.full((2, length, 2), gate)
    arrays = [q, k, v, *gates, initial]
    actual, expected = (gradients(run, arrays) for run in (interpreted, plain))
    for a, b in zip(actual, expected, strict=True):
        close(a, b, 3e-5)


def test_nothing_is_read_before_it_is_written_on_a_simulated_chip():
    """Scratch memory and outputs start as NaN there."""
    *tokens, initial = inputs(140)
    given = {"scale": SCALE, "documents": documents(140), "initial": initial}
    simulated = pltpu.InterpretParams(uninitialized_memory="nan")
    runs = (functools.partial(delta_rule, interpret=simulated), plain)
    found, wanted = (jax.jit(functools.partial(run, **given))(*tokens).out for run in runs)
    close(found, wanted, 1e-5)


def test_the_kernels_move_little_more_than_the_floor():
    """Operands and results of both calls, from their shapes, at the 340M widths: 9,888 bytes per token and head are what
    inputs, outputs, their gradients and bfloat16 states of every 64 tokens come to; the states of the first and last
    token come on top."""
    batch, length, heads, width = 2, 8192, 4, 256
    wide = jax.ShapeDtypeStruct((batch, length, heads, width), jnp.bfloat16)
    gates = jax.ShapeDtypeStruct((batch, length, heads), jnp.float32)

    def loss(*arrays):
        return jnp.sum(delta_rule(*arrays, scale=SCALE, normalise=True).out.astype(jnp.float32))

    calls = pallas_calls(jax.make_jaxpr(jax.grad(loss, argnums=tuple(range(5))))(wide, wide, wide, gates, gates).jaxpr)
    assert len(calls) == 2
    moved = sum(x.aval.size * x.aval.dtype.itemsize for call in calls for x in (*call.invars, *call.outvars))
    assert moved < 1.05 * 9888 * batch * length * heads


def pallas_calls(jaxpr):
    """Every kernel call in a program."""
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call"]
    inner = [x for eqn in jaxpr.eqns if eqn not in found for x in eqn.params.values() if hasattr(x, "jaxpr")]
    return found + [call for x in inner for call in pallas_calls(x.jaxpr)]


def test_keys_are_normalised_on_the_chip_when_asked():
    q, k, *rest = inputs(70)
    q, k = q * 3, k * jnp.linspace(0, 2, 70)[:, None, None]  # a key of zeros among them
    here = gradients(functools.partial(delta_rule, interpret=True, normalise=True), [q, k, *rest])
    there = gradients(lambda q, k, *rest, **options: plain(unit_l2(q), unit_l2(k), *rest, **options), [q, k, *rest])
    for a, b in zip(here, there, strict=True):
        close(a, b, 3e-5)


def test_a_document_does_not_see_another():
    length = 130
    *tokens, initial = inputs(length)
    ids = documents(length)
    changed = [jnp.where((ids == 1).reshape(ids.shape + (1,) * (x.ndim - 2)), x * 0.5, x) for x in tokens]
    run = jax.jit(functools.partial(interpreted, scale=SCALE, documents=ids, initial=initial))
    before, after = np.asarray(run(*tokens).out), np.asarray(run(*changed).out)
    others = np.asarray(ids) > 1
    np.testing.assert_array_equal(before[others], after[others])
    assert not before[np.asarray(ids) == 0].any()
    assert (before[np.asarray(ids) == 1] != after[np.asarray(ids) == 1]).any()


def test_what_cannot_run_is_refused_by_name():
    q, k, v, beta, decay, _ = inputs(8, key_dim=64, value_dim=64)
    with pytest.raises(NotImplementedError, match="per key channel"):
        delta_rule(q, k, v, beta, jnp.zeros((*decay.shape, 64)), scale=1.0)
    with pytest.raises(NotImplementedError, match="K is 48"):
        delta_rule(q[..., :48], k[..., :48], v, beta, decay, scale=1.0)
    with pytest.raises(NotImplementedError, match="V is 32"):
        delta_rule(q, k, v[..., :32], beta, decay, scale=1.0)
    with pytest.raises(NotImplementedError, match="v is float16"):
        delta_rule(q, k, v.astype("float16"), beta, decay, scale=1.0)
    with pytest.raises(ValueError, match="beta is"):
        delta_rule(q, k, v, beta[:, 1:], decay, scale=1.0)
    with pytest.raises(ValueError, match="initial is"):
        delta_rule(q, k, v, beta, decay, scale=1.0, initial=jnp.zeros((2, 1, 64, 64)))
    with pytest.raises(ValueError, match="documents is"):
        delta_rule(q, k, v, beta, decay, scale=1.0, documents=jnp.ones((2, 9), jnp.int32))
    with pytest.raises(ValueError, match="magnitude is"):
        delta_rule(q, k, v, beta, decay, scale=1.0, magnitude="loudness")
    with pytest.raises(ValueError, match="do not fit"):
        delta_rule(q[:, 1:], k, v, beta, decay, scale=1.0)


COMPILE = """
import jax, jax.numpy as jnp
from pallas_kernels.delta_rule import delta_rule

B, T, H, K, V = 8, 2048, 4, 256, 256

def loss(q, k, v, beta, log_decay, initial, documents):
    # As in the model, where a projection makes the heads side by side.
    q, k, v = (x.reshape(B, T, H, -1) for x in (q, k, v))
    given = {"documents": documents, "initial": initial, "normalise": True, "magnitude": "surprise"}
    result = delta_rule(q, k, v, beta, log_decay, scale=K**-0.5, **given)
    return jnp.sum(result.out.astype(jnp.float32)) + jnp.sum(result.final) + jnp.sum(result.magnitude)

def compiled(name):
    here = jax.sharding.SingleDeviceSharding(chip(name))
    shapes = [((B, T, H * K), "bfloat16")] * 2 + [((B, T, H * V), "bfloat16")] + [((B, T, H), "float32")] * 2
    shapes += [((B, H, K, V), "float32"), ((B, T), "int32")]
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=here) for shape in shapes]
    both = [jax.grad(loss, argnums=tuple(range(6)))]  # the forward kernel asks for more where it saves states
    programs = [jax.jit(f).lower(*arrays).compile() for f in ([loss] if name == "v5e:2x2" else []) + both]
    assert all("delta_rule_forward" in program.as_text() for program in programs)
    return [program.memory_analysis().temp_size_in_bytes for program in programs]
"""
COMPILED = {name: (name,) for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")}


@pytest.fixture(scope="module")
def temporary():
    return tpus.told(COMPILE, COMPILED)


@pytest.mark.slow
@tpus.needed
@pytest.mark.parametrize("topology", COMPILED)
def test_forward_and_backward_compile_for_a_tpu_at_the_340m_shapes(topology, temporary):
    """The compiler refuses what VMEM's default cannot hold."""
    *alone, both = temporary(topology)
    assert all(forward < 64 * 2**20 for forward in alone)
    assert len(alone) == (topology == "v5e:2x2") and both < 192 * 2**20  # 128 MiB of it are saved states
