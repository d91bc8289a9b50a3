"""Laws of the memories that are a state alone: the delta rule with one decay per token or per channel, and GLA."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hola_jax.memory import LinearState, init_linear_state, linear_memory

B, T, H, h, K, V, CHUNK = 2, 48, 4, 2, 8, 6, 20  # a chunk is one sub-block of decays and a piece of another
SCALE = K**-0.5
MEMORIES = ("gdn", "kda", "gla", "scalar_gla")
Tokens = dict[str, Any]


def tokens_of(memory: str, length: int = T, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    per_channel = memory in ("kda", "gla")
    decay = rng.exponential(size=(B, length, H, K) if per_channel else (B, length, H)) * 0.3
    tokens = {
        "q": rng.normal(size=(B, length, h, K)),
        "k": rng.normal(size=(B, length, h, K)),
        "v": rng.normal(size=(B, length, H, V)),
        "beta": rng.uniform(size=(B, length, H)) if memory in ("gdn", "kda") else None,
        "log_decay": -decay,
    }
    return {name: x if x is None else jnp.asarray(x, jnp.float32) for name, x in tokens.items()}


def random_state(seed: int = 9, document: int = 1) -> LinearState:
    weights = np.random.default_rng(seed).normal(size=(B, H, K, V))
    return LinearState(jnp.asarray(weights, jnp.float32), jnp.full(B, document, jnp.int32))


def run(tokens: Tokens, ids: Any, state: LinearState | None, **options: Any) -> tuple[jax.Array, LinearState]:
    normalise = tokens["beta"] is not None
    options = {"chunk": CHUNK, "scale": SCALE, "normalise": normalise} | options
    return linear_memory(**tokens, segment_ids=ids, state=state, **options)


memory_jit = jax.jit(run, static_argnames=("implementation", "chunk", "scan", "sequence_axis"))


@partial(jax.jit, static_argnames="memory")
def with_gradients(memory: Any, tokens: Tokens, ids: Any, state: LinearState, seen: jax.Array) -> Any:
    """Gradients of a function of the final state and the outputs that are `seen`; outputs and state."""

    def loss(tokens: Tokens, fast_weights: jax.Array) -> tuple[jax.Array, Any]:
        out, after = memory(tokens, ids, LinearState(fast_weights, state.document))
        kept = jnp.sum(jnp.sin(after.fast_weights + 1)) * seen[-1]
        return jnp.sum(jnp.sin(out + 1) * seen[:, None, None]) + kept, (out, after)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(tokens, state.fast_weights)


xla, reference, by_kernels = (partial(run, implementation=name) for name in ("xla", "reference", "interpret"))


def whole(tokens: Tokens, ids: Any, state: LinearState, memory: Any = xla) -> tuple[jax.Array, LinearState]:
    """What `with_gradients` has compiled already."""
    return with_gradients(memory, tokens, ids, state, jnp.ones(T))[1]


def one_document(length: int = T) -> jax.Array:
    return jnp.ones((B, length), jnp.int32)


def packed() -> jax.Array:
    """Documents that begin inside and at the end of chunks, with padding in front, between and behind."""
    first = [0] * 3 + [1] * 17 + [2] * 9 + [0] * 2 + [2] * 4 + [5] * 8 + [0] * 5
    second = [1] * 39 + [3] * 9
    return jnp.asarray([first, second], jnp.int32)


def close(actual: Any, expected: Any, tolerance: float = 3e-5) -> None:
    """Float32 sums of some hundred terms of size 1, in another order; relative to the largest entry."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(np.asarray(a)).all()
        bound = tolerance * max(1.0, float(np.abs(e).max(initial=0.0)))
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(e, np.float64), atol=bound, rtol=0)


def mixed(log_decay: jax.Array) -> jax.Array:
    """No decay, some, and so much that a running sum has no digits left for the rest."""
    kind = np.random.default_rng(3).integers(4, size=log_decay.shape)
    return jnp.asarray(np.choose(kind, [0.0, log_decay, -50.0, -3000.0]), jnp.float32)


GATES = {
    "usual": lambda t: t,
    "no decay": lambda t: t | {"log_decay": jnp.zeros_like(t["log_decay"])},
    "strong decay": lambda t: t | {"log_decay": jnp.full_like(t["log_decay"], -50.0)},
    "mixed decay": lambda t: t | {"log_decay": mixed(t["log_decay"])},
    "zero keys": lambda t: t | {"k": t["k"].at[:, 10:30].set(0.0)},
    "beta 0": lambda t: t | {"beta": jnp.zeros((B, T, H))},
    "beta 1, repeated keys": lambda t: t | {"beta": jnp.ones((B, T, H)), "k": t["k"].at[:].set(t["k"][:, :1])},
}
WITHOUT_BETA = [name for name in GATES if not name.startswith("beta")]
CASES = [(m, gates) for m in MEMORIES for gates in (GATES if m in ("gdn", "kda") else WITHOUT_BETA)]


@pytest.mark.parametrize(("memory", "gates"), CASES)
def test_chunks_are_the_recurrence_forward_and_backward(memory: str, gates: str) -> None:
    tokens = GATES[gates](tokens_of(memory))
    for ids in (one_document(), packed()):
        fast, slow = (with_gradients(f, tokens, ids, random_state(), jnp.ones(T)) for f in (xla, reference))
        close(fast[1], slow[1])
        close(fast[0], slow[0], 2e-4 if gates != "beta 1, repeated keys" else 1e-3)


@pytest.mark.parametrize("gates", GATES)
def test_the_delta_rules_kernel_is_the_recurrence_forward_and_backward(gates: str) -> None:
    tokens = GATES[gates](tokens_of("gdn"))
    for ids in (one_document(), packed()):
        fast, slow = (with_gradients(f, tokens, ids, random_state(), jnp.ones(T)) for f in (by_kernels, reference))
        close(fast[1], slow[1])
        close(fast[0], slow[0], 2e-4 if gates != "beta 1, repeated keys" else 1e-3)


@pytest.mark.parametrize("memory", MEMORIES)
def test_the_reference_is_the_equations_in_float64(memory: str) -> None:
    tokens = tokens_of(memory)
    out, after = whole(tokens, one_document(), random_state(), reference)
    exact = {name: None if x is None else np.asarray(x, np.float64) for name, x in tokens.items()}
    state, expected = np.asarray(random_state().fast_weights, np.float64), np.zeros(out.shape)
    for b, t, n in np.ndindex(B, T, H):
        q, k, v = exact["q"][b, t, n // (H // h)], exact["k"][b, t, n // (H // h)], exact["v"][b, t, n]
        decayed = np.exp(exact["log_decay"][b, t, n]).reshape(-1, 1) * state[b, n]
        if exact["beta"] is None:
            state[b, n] = decayed + np.outer(k, v)
        else:
            q, k = q / np.sqrt(q @ q + 1e-6), k / np.sqrt(k @ k + 1e-6)
            state[b, n] = decayed + exact["beta"][b, t, n] * np.outer(k, v - decayed.T @ k)
        expected[b, t, n] = SCALE * state[b, n].T @ q
    close((out, after.fast_weights), (expected, state))


@pytest.mark.parametrize("memory", ("kda", "gla"))
def test_whole_is_split_anywhere_is_token_by_token(memory: str) -> None:
    tokens, ids, state = tokens_of(memory), packed(), random_state()
    expected = whole(tokens, ids, state)
    pieces, here = [], state
    for start, stop in ((0, 24), (24, 48)):  # inside a chunk
        piece = jax.tree.map(lambda x, a=start, b=stop: x[:, a:b], tokens)
        out, here = memory_jit(piece, ids[:, start:stop], here)
        pieces.append(out)
    close((jnp.concatenate(pieces, axis=1), here), expected)
    assert list(here.document) == [5, 3]
    close(token_by_token(tokens, ids, state), expected)


@jax.jit
def token_by_token(tokens: Tokens, ids: jax.Array, state: LinearState) -> tuple[jax.Array, LinearState]:
    def step(state: LinearState, token: tuple[Tokens, jax.Array]) -> tuple[LinearState, jax.Array]:
        out, state = run(*token, state)
        return state, out[:, 0]

    apart = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], (tokens, ids))
    state, out = jax.lax.scan(step, state, apart)
    return jnp.moveaxis(out, 0, 1), state


@pytest.mark.parametrize("memory", ("gdn", "gla"))
def test_without_segment_ids_all_tokens_continue_the_state(memory: str) -> None:
    tokens, state = tokens_of(memory), random_state(document=3)
    out, after = memory_jit(tokens, None, state)
    close((out, after), whole(tokens, 3 * one_document(), state))
    assert list(after.document) == [3, 3]


def test_without_a_state_the_memory_is_empty() -> None:
    tokens, empty = tokens_of("gla"), init_linear_state(B, H, K, V)
    close(memory_jit(tokens, None, None), whole(tokens, one_document(), empty))


def test_an_associative_scan_gives_the_same() -> None:
    tokens = tokens_of("gla")
    close(
        memory_jit(tokens, packed(), random_state(), scan="associative"), memory_jit(tokens, packed(), random_state())
    )


@pytest.mark.parametrize("memory", ("gdn", "gla"))
def test_padding_is_as_if_it_were_not_there(memory: str) -> None:
    real, fresh = tokens_of(memory, 40), init_linear_state(B, H, K, V)
    results = []
    for left, middle in ((0, 0), (8, 0), (4, 3)):
        place = np.concatenate([np.arange(left, left + 20), np.arange(left + 20 + middle, left + middle + 40)])
        ids = jnp.zeros((B, T), jnp.int32).at[:, place].set(1)
        garbage = jax.tree.map(lambda x: x.at[:, 5].set(jnp.nan), tokens_of(memory, T, seed=left + 1))
        tokens = jax.tree.map(lambda x, r, p=place: x.at[:, p].set(r), garbage, real)
        out, state = whole(tokens, ids, fresh)
        assert not np.asarray(out)[np.asarray(ids) == 0].any()
        results.append((out[:, place], state))
    close(results[1], results[0])
    close(results[2], results[0])


def test_padding_alone_changes_nothing() -> None:
    for memory in ("gdn", "gla"):
        state = random_state(document=4)
        for length, run in ((1, memory_jit), (T, whole)):
            out, after = run(tokens_of(memory, length), jnp.zeros((B, length), jnp.int32), state)
            assert not np.asarray(out).any()
            np.testing.assert_array_equal(after.fast_weights, state.fast_weights)
            assert list(after.document) == [4, 4]


BY = {"xla": xla, "kernels": by_kernels}
WAYS = [("gdn", "xla"), ("gla", "xla"), ("gdn", "kernels")]


@pytest.mark.parametrize("value", (np.nan, np.inf))
@pytest.mark.parametrize(
    ("memory", "way", "name"),
    [(m, way, x) for m, way in WAYS for x in ("q", "k", "v", "beta", "log_decay") if m + x != "glabeta"],
)
def test_nan_spoils_its_own_document_from_its_token_on(memory: str, way: str, name: str, value: float) -> None:
    clean, ids, state = tokens_of(memory), packed(), random_state()
    expected, expected_state = whole(clean, ids, state, BY[way])
    at, head = 23, 1  # inside document 2 of row 0
    bad = clean | {name: clean[name].at[0, at, head].set(value)}
    gradients, (given, after) = with_gradients(BY[way], bad, ids, state, jnp.ones(T))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    heads = [head] if clean[name].shape[2] == H else [2, 3]  # key head 1 serves value heads 2 and 3
    spoilt = np.zeros((B, T, H), bool)
    last = at + 1 if name == "q" else 35
    spoilt[0, at:last, heads] = True
    spoilt &= np.asarray(ids > 0)[..., None]
    np.testing.assert_array_equal(np.isnan(given).all(-1), spoilt)
    np.testing.assert_array_equal(np.where(spoilt[..., None], 0, given), np.where(spoilt[..., None], 0, expected))
    np.testing.assert_array_equal(after.fast_weights, expected_state.fast_weights)  # document 5 came behind it


def test_a_spoilt_state_ends_with_its_document() -> None:
    state = random_state()
    bad = LinearState(state.fast_weights.at[0, 2, 0, 0].set(jnp.nan), state.document)
    for memory, way in WAYS:
        expected, _ = whole(tokens_of(memory), packed(), state, BY[way])
        out, after = whole(tokens_of(memory), packed(), bad, BY[way])
        spoilt = np.zeros((B, T, H), bool)
        spoilt[0, 3:20, 2] = True
        np.testing.assert_array_equal(np.isnan(out).all(-1), spoilt)
        np.testing.assert_array_equal(np.where(spoilt[..., None], 0, out), np.where(spoilt[..., None], 0, expected))
        assert np.isfinite(after.fast_weights).all()
        _, continued = memory_jit(tokens_of(memory, 1), one_document(1), bad)
        np.testing.assert_array_equal(np.isnan(continued.fast_weights).all((2, 3)), spoilt[:, 5])


def test_documents_do_not_see_each_other() -> None:
    ids = packed()
    for memory in ("gdn", "gla"):
        tokens, other = tokens_of(memory), tokens_of(memory, seed=1)
        changed = jax.tree.map(
            lambda x, y: jnp.where((ids == 2).reshape(B, T, *[1] * (x.ndim - 2)), 100 * y, x), tokens, other
        )
        before, after = (whole(x, ids, random_state())[0] for x in (tokens, changed))
        others = np.asarray(ids != 2)
        np.testing.assert_array_equal(np.asarray(before)[others], np.asarray(after)[others])


def test_an_output_depends_on_no_later_token() -> None:
    seen = jnp.ones(T).at[27:].set(0)
    for memory in MEMORIES:
        gradients, _ = with_gradients(xla, tokens_of(memory), one_document(), random_state(), seen)
        for x in jax.tree.leaves(gradients[0]):
            assert np.asarray(x)[:, :27].any() and not np.asarray(x)[:, 27:].any()


@cache
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))


def on_devices(tokens: Tokens, ids: Any, state: LinearState) -> tuple[jax.Array, LinearState]:
    along = P(None, "sequence")
    body = partial(run, chunk=4, sequence_axis="sequence")
    in_specs = (along, None if ids is None else along, P())
    return jax.shard_map(body, mesh=mesh(), in_specs=in_specs, out_specs=(along, P()), check_vma=False)(
        tokens, ids, state
    )


def same_nans(actual: Any, expected: Any) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(e))


@pytest.mark.parametrize("memory", ("gdn", "gla"))
def test_eight_devices_are_one(memory: str) -> None:
    tokens, state = tokens_of(memory), random_state(document=2)
    # Six tokens on a device, a chunk and a half. Documents over devices; devices of padding, amid and behind.
    ids = jnp.asarray([[2] * 4 + [3] * 3 + [0] * 14 + [3] * 6 + [4] * 15 + [0] * 6, [2] * T], jnp.int32)
    one, many = (with_gradients(f, tokens, ids, state, jnp.ones(T)) for f in (xla, on_devices))
    close(many, one, 2e-4)
    spoilt = tokens | {"v": tokens["v"].at[:, 7, 1].set(jnp.nan).at[0, 3, 2].set(jnp.nan)}
    one, many = (whole(spoilt, ids, state, f) for f in (xla, on_devices))
    assert np.isnan(one[0]).any() and np.isnan(one[1].fast_weights).any()
    same_nans(many, one)


def test_eight_devices_continue_a_state_without_segment_ids() -> None:
    state, tokens = random_state(document=3), tokens_of("gla")
    tokens["v"] = tokens["v"].at[1, 7, 1].set(jnp.nan)
    one, many = whole(tokens, 3 * one_document(), state), jax.jit(on_devices)(tokens, None, state)
    assert list(many[1].document) == [3, 3]
    same_nans(many, one)
    close(jax.tree.map(jnp.nan_to_num, many), jax.tree.map(jnp.nan_to_num, one))


def test_outputs_have_the_type_of_the_values() -> None:
    for memory, length in (("gdn", 1), ("gla", 1), ("gla", 3)):
        tokens = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tokens_of(memory, length))
        out, after = jax.eval_shape(partial(run, ids=None, state=init_linear_state(B, H, K, V)), tokens)
        assert out.dtype == jnp.bfloat16 and after.fast_weights.dtype == jnp.float32


REFUSED = {
    "v has shape": lambda t: (t | {"v": t["v"][0]}, {}),
    "log_decay has shape": lambda t: (t | {"log_decay": t["log_decay"][:, :3]}, {}),
    "the key heads must divide": lambda t: (t | {"q": t["q"][:, :, [0, 1, 0]], "k": t["k"][:, :, [0, 1, 0]]}, {}),
    "segment_ids has shape": lambda t: (t, {"ids": one_document(3)}),
    "chunk is 0": lambda t: (t, {"chunk": 0}),
    "scan is 'fast'": lambda t: (t, {"scan": "fast"}),
    "implementation is 'cuda'": lambda t: (t, {"implementation": "cuda"}),
    r"state.fast_weights has shape \(2, 3, 8, 6\)": lambda t: (t, {"state": init_linear_state(B, 3, K, V)}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_by_name(message: str) -> None:
    tokens, options = REFUSED[message](tokens_of("gdn"))
    with pytest.raises(ValueError, match=message):
        run(tokens, **({"ids": None, "state": None} | options))


def test_types_and_kernels_that_are_not_there_are_refused() -> None:
    tokens = tokens_of("gdn")
    with pytest.raises(TypeError, match="state is a tuple; it must be a LinearState"):
        run(tokens, None, (1, 2))  # type: ignore[arg-type]
    with pytest.raises(
        NotImplementedError, match=r"there are kernels for .*, and this is cpu; use implementation='xla'"
    ):
        run(tokens, None, None, implementation="pallas")
    for memory, reason in (("kda", "not one per key channel"), ("gla", "does not write by the delta rule")):
        with pytest.raises(NotImplementedError, match=reason):
            run(tokens_of(memory), None, None, implementation="interpret")
    with pytest.raises(NotImplementedError, match="reference"):
        run(tokens, None, None, implementation="reference", sequence_axis="sequence")


def test_values_are_checked_where_asked() -> None:
    from jax.experimental import checkify

    checked = jax.jit(checkify.checkify(lambda tokens, ids: run(tokens, ids, None, check=True)[0]))
    tokens, ids = tokens_of("gla", 3), one_document(3)
    assert checked(tokens, ids)[0].get() is None
    assert "positive" in checked(tokens | {"log_decay": -tokens["log_decay"]}, ids)[0].get()
    assert "decreases" in checked(tokens, jnp.asarray([[1, 2, 1]] * B, jnp.int32))[0].get()
