"""Small memories for the laws: inputs, configurations, compiled calls, and what it means for two states to be one."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from hola_jax.memory import CacheParams, MemoryConfig, MemoryState, hola_memory

B, T, KEY_HEADS, H, K, V = 2, 37, 1, 2, 8, 6
CONFIG = MemoryConfig(window=4, block=8, chunk=4)
# Scores that change while a pair is held, and run on a path of their own, in plain XLA.
RESCORED = {score: MemoryConfig(window=4, block=8, chunk=4, score=score) for score in ("attention", "recall")}
RESCORED |= {"eviction": MemoryConfig(window=4, block=8, chunk=4, score="recall", write="eviction")}
# With those that are learned, of which only some tokens compete, and what else may decide or weigh: all whose path is not
# that of "surprise".
OTHER = RESCORED | {
    "learned": MemoryConfig(window=4, block=8, chunk=4, score="learned", sparsity=0.2),
    "choice": MemoryConfig(window=4, block=8, chunk=4, fade=9.0, read_credit=-0.7, same_key=0.5, budget=5),
    "power": MemoryConfig(window=4, block=8, chunk=4, read_power=True),
}
# What every implementation is held to.
VARIANTS = {
    "surprise": CONFIG,
    "residual-unit_l2": MemoryConfig(window=4, block=8, chunk=4, score="residual", read="unit_l2", scan="associative"),
    "write": MemoryConfig(window=10, block=6, chunk=3, score="write"),  # a cache wider than a block
    "recency": MemoryConfig(window=3, block=16, chunk=16, score="recency", state_scale=1.0),
    "no-cache": MemoryConfig(window=0, block=8, chunk=4),
    "energy": MemoryConfig(window=4, block=8, chunk=4, read_energy=0.7, fade=9.0),
    **OTHER,
}
# What stands for all of them where each costs programs of its own: "choice" also adds what reads give, as "attention" does,
# and "power" changes no more than logits.
FEW = {name: OTHER[name] for name in ("recall", "eviction", "learned", "choice")}
PARAMS = CacheParams(
    query_scale=jnp.linspace(0.8, 1.3, K),
    key_scale=jnp.linspace(1.2, 0.7, K),
    sink_logit=jnp.array([0.3, -0.5]),
    gate_logit=jnp.array([0.5, -1.0]),
    temperature=jnp.array([2.0, 3.0]),
    power=jnp.array([0.4, -0.3]),
)
# Two documents behind left padding; two documents (ids with a gap) and right padding, in mid-block and mid-chunk.
SEGMENTS = np.ones((B, T), np.int32)
SEGMENTS[0, :5], SEGMENTS[0, 20:] = 0, 2
SEGMENTS[1, 11:], SEGMENTS[1, 30:] = 3, 0


def inputs(seed: int = 0, tokens: int = T, batch: int = B, dtype: str = "float32", key_heads: int = KEY_HEADS) -> list:
    """q, k, v, beta, log_decay."""
    draw = np.random.default_rng(seed)
    q, k = (jnp.asarray(draw.normal(size=(batch, tokens, key_heads, K)), dtype) for _ in range(2))
    v = jnp.asarray(draw.normal(size=(batch, tokens, H, V)), dtype)
    beta = jnp.asarray(draw.uniform(size=(batch, tokens, H)), jnp.float32)
    return [q, k, v, beta, -jnp.asarray(draw.uniform(size=(batch, tokens, H)), jnp.float32)]


def compiled(config: MemoryConfig, implementation: str | None = None):
    """hola_memory under jit: (arrays, segment_ids, state, params) -> (out, state)."""
    if implementation is None and jax.default_backend() == "cpu":
        implementation = "xla"  # what is chosen there: one program, asked for or not
    return _compiled(config, implementation)


@functools.cache
def _compiled(config: MemoryConfig, implementation: str | None):
    @jax.jit
    def run(arrays, segment_ids, state, params):
        options = {"config": config, "segment_ids": segment_ids, "state": state, "implementation": implementation}
        return hola_memory(*arrays, params, **options, learned=learned(config, arrays))

    def with_all(arrays, segment_ids=None, state=None, params=PARAMS):  # given or not, PARAMS make the same program
        return run(arrays, segment_ids, state, params)

    return with_all


def learned(config: MemoryConfig, arrays: list):
    """What stands for a layer's scores where they are learned: a number of each token's value."""
    if config.score != "learned":
        return None
    return jnp.sum(arrays[2].astype(jnp.float32) * jnp.cos(jnp.arange(V)), axis=-1)


@functools.cache
def compiled_gradient(config: MemoryConfig, implementation: str | None = None):
    """Gradient of a nonlinear function of outputs and state, by inputs and parameters; and (out, state), by one program.
    With `at`, of the outputs at that place alone."""
    if implementation == "reference":
        config = config.meaning()  # it has no chunks: one program whatever they are

    def loss(arrays, params, segment_ids, of_outputs, of_state):
        out, state = compiled(config, implementation)(arrays, segment_ids, None, params)
        kept = jnp.sum(state.cache_values.astype(jnp.float32) ** 2) + jnp.sum(jnp.cos(state.cache_keys))
        total = jnp.sum(of_outputs[:, None, None] * jnp.sin(out.astype(jnp.float32)))
        return total + of_state * (jnp.sum(jnp.tanh(state.fast_weights)) + 0.1 * kept), (out, state)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    def run(arrays, params, segment_ids=None, at: int | None = None):
        places = np.arange(arrays[0].shape[1])
        of_outputs = np.ones(len(places)) if at is None else places == at
        return gradient(arrays, params, segment_ids, of_outputs.astype(np.float32), np.float32(at is None))

    return run


def pieces(arrays: list, cuts: list[int]) -> list[list]:
    edges, arrays = [0, *cuts, arrays[0].shape[1]], [np.asarray(x) for x in arrays]
    return [[x[:, a:b] for x in arrays] for a, b in itertools.pairwise(edges)]


def run_in_pieces(run, arrays: list, segment_ids, cuts: list[int], state=None):
    """The outputs of the pieces joined, and the state behind the last."""
    parts = pieces([*arrays] if segment_ids is None else [*arrays, segment_ids], cuts)
    outs = []
    for part in parts:
        if part[0].shape[1] == 0:
            continue
        out, state = run(part[:5], part[5] if segment_ids is not None else None, state)
        outs.append(out)
    return np.concatenate(outs, axis=1), state


def assert_same_state(a: MemoryState, b: MemoryState, atol: float = 2e-5) -> None:
    """Integers identical (so the same tokens are kept), numbers close."""
    for field in dataclasses.fields(MemoryState):
        if field.name in ("config", "scorer"):
            continue
        if getattr(a, field.name) is None:
            assert getattr(b, field.name) is None
            continue
        left, right = (np.asarray(getattr(state, field.name)) for state in (a, b))
        if left.dtype == np.int32:
            np.testing.assert_array_equal(left, right, err_msg=field.name)
        else:
            left, right = left.astype(np.float32), right.astype(np.float32)
            np.testing.assert_allclose(left, right, atol=atol, rtol=1e-4, err_msg=field.name)


def assert_close(actual, expected, atol: float = 2e-5, name: str = "") -> None:
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, atol=atol, rtol=1e-4, err_msg=name)
