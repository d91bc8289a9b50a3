"""Laws of the gated slots."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hola_jax.memory import SlotState, init_slot_state, slot_memory

B, T, H, h, M, K, V, CHUNK = 2, 48, 4, 2, 5, 8, 6, 20  # a chunk is one sub-block of decays and a piece of another
Tokens = dict[str, Any]


def tokens_of(length: int = T, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    tokens = {
        "q": rng.normal(size=(B, length, h, K)),
        "k": rng.normal(size=(B, length, h, K)),
        "v": rng.normal(size=(B, length, H, V)),
        "log_forget": -rng.exponential(size=(B, length, H, M)) * 0.3,
    }
    return {name: jnp.asarray(x, jnp.float32) for name, x in tokens.items()}


def random_state(document: int = 1) -> SlotState:
    rng = np.random.default_rng(9)
    keys, values = (jnp.asarray(rng.normal(size=(B, H, M, X)), jnp.float32) for X in (K, V))
    return SlotState(keys, values, jnp.full(B, document, jnp.int32))


def run(tokens: Tokens, ids: Any, state: SlotState | None, **options: Any) -> tuple[jax.Array, SlotState]:
    return slot_memory(**tokens, segment_ids=ids, state=state, **({"chunk": CHUNK} | options))


memory_jit = jax.jit(run)


@partial(jax.jit, static_argnames="memory")
def with_gradients(memory: Any, tokens: Tokens, ids: Any, state: SlotState, seen: Any) -> Any:
    """Gradients of a function of the final state and the outputs that are `seen`; outputs and state."""

    def loss(tokens: Tokens, slots: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        out, after = memory(tokens, ids, SlotState(*slots, state.document))
        kept = jnp.sum(jnp.sin(after.keys)) + jnp.sum(jnp.sin(after.values))
        return jnp.sum(jnp.sin(out + 1) * seen[:, None, None]) + kept * seen[-1], (out, after)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(tokens, (state.keys, state.values))


xla, reference = partial(run), partial(run, implementation="reference")


def whole(tokens: Tokens, ids: Any, state: SlotState) -> tuple[jax.Array, SlotState]:
    """What `with_gradients` has compiled already."""
    return with_gradients(xla, tokens, ids, state, jnp.ones(T))[1]


def one_document() -> jax.Array:
    return jnp.ones((B, T), jnp.int32)


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


def mixed(log_forget: jax.Array) -> jax.Array:
    """All kept, some, and so little that a running sum has no digits left for the rest."""
    kind = np.random.default_rng(3).integers(4, size=log_forget.shape)
    return jnp.asarray(np.choose(kind, [0.0, log_forget, -50.0, -3000.0]), jnp.float32)


GATES = {
    "usual": lambda t: t,
    "nothing forgotten": lambda t: t | {"log_forget": jnp.zeros_like(t["log_forget"])},
    "all forgotten": lambda t: t | {"log_forget": jnp.full_like(t["log_forget"], -50.0)},
    "hardly anything forgotten": lambda t: t | {"log_forget": 1e-6 * t["log_forget"]},
    "mixed": lambda t: t | {"log_forget": mixed(t["log_forget"])},
    "zero keys": lambda t: t | {"k": t["k"].at[:, 10:30].set(0.0)},
    "sharp": lambda t: t | {"q": 30 * t["q"]},
}


@pytest.mark.parametrize("gates", GATES)
def test_chunks_are_the_recurrence_forward_and_backward(gates: str) -> None:
    tokens = GATES[gates](tokens_of())
    tolerance = 3e-5 if gates != "sharp" else 1e-3  # logits of size 100 have errors of 1e-5, and weights take them over
    for ids in (one_document(), packed()):
        fast, slow = (with_gradients(f, tokens, ids, random_state(), jnp.ones(T)) for f in (xla, reference))
        close(fast[1], slow[1], tolerance)
        close(fast[0], slow[0], 10 * tolerance)


def test_the_reference_is_the_equations_in_float64() -> None:
    tokens, state = tokens_of(), random_state()
    out, after = with_gradients(reference, tokens, one_document(), state, jnp.ones(T))[1]
    q, k, v, log_forget = (np.asarray(x, np.float64) for x in tokens.values())
    keys, values = (np.asarray(x, np.float64) for x in (state.keys, state.values))
    expected = np.zeros(out.shape)
    for b, t, n in np.ndindex(B, T, H):
        keep = np.exp(log_forget[b, t, n])[:, None]
        keys[b, n] = keep * keys[b, n] + (1 - keep) * k[b, t, n // (H // h)]
        values[b, n] = keep * values[b, n] + (1 - keep) * v[b, t, n]
        weights = np.exp(keys[b, n] @ q[b, t, n // (H // h)])
        expected[b, t, n] = weights / weights.sum() @ values[b, n]
    close((out, after.keys, after.values), (expected, keys, values))


def test_whole_is_split_anywhere_is_token_by_token() -> None:
    tokens, ids, state = tokens_of(), packed(), random_state()
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
def token_by_token(tokens: Tokens, ids: jax.Array, state: SlotState) -> tuple[jax.Array, SlotState]:
    def step(state: SlotState, token: tuple[Tokens, jax.Array]) -> tuple[SlotState, jax.Array]:
        out, state = run(*token, state)
        return state, out[:, 0]

    apart = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], (tokens, ids))
    state, out = jax.lax.scan(step, state, apart)
    return jnp.moveaxis(out, 0, 1), state


def test_without_segment_ids_all_tokens_continue_the_state() -> None:
    tokens, state = tokens_of(), random_state(document=3)
    result = memory_jit(tokens, None, state)
    close(result, whole(tokens, 3 * one_document(), state))
    assert list(result[1].document) == [3, 3]
    close(memory_jit(tokens, None, None), whole(tokens, one_document(), init_slot_state(B, H, M, K, V)))


def test_padding_is_as_if_it_were_not_there() -> None:
    real, fresh = tokens_of(40), init_slot_state(B, H, M, K, V)
    results = []
    for left, middle in ((0, 0), (8, 0), (4, 3)):
        place = np.concatenate([np.arange(left, left + 20), np.arange(left + 20 + middle, left + middle + 40)])
        ids = jnp.zeros((B, T), jnp.int32).at[:, place].set(1)
        garbage = jax.tree.map(lambda x: x.at[:, 5].set(jnp.nan), tokens_of(T, seed=left + 1))
        tokens = jax.tree.map(lambda x, r, p=place: x.at[:, p].set(r), garbage, real)
        out, state = whole(tokens, ids, fresh)
        assert not np.asarray(out)[np.asarray(ids) == 0].any()
        results.append((out[:, place], state))
    close(results[1], results[0])
    close(results[2], results[0])


@pytest.mark.parametrize("name", ("q", "k", "v", "log_forget"))
def test_nan_spoils_its_own_document_from_its_token_on(name: str) -> None:
    clean, ids, state = tokens_of(), packed(), random_state()
    expected, expected_state = whole(clean, ids, state)
    at, head = 23, 1  # inside document 2 of row 0
    given, after = whole(clean | {name: clean[name].at[0, at, head, 0].set(jnp.nan)}, ids, state)
    heads = [head] if clean[name].shape[2] == H else [2, 3]  # key head 1 serves value heads 2 and 3
    spoilt = np.zeros((B, T, H), bool)
    spoilt[0, at : at + 1 if name == "q" else 35, heads] = True
    spoilt &= np.asarray(ids > 0)[..., None]
    np.testing.assert_array_equal(np.isnan(given).all(-1), spoilt)
    np.testing.assert_array_equal(np.where(spoilt[..., None], 0, given), np.where(spoilt[..., None], 0, expected))
    close(after, expected_state, 0)  # document 5 came behind it


def test_a_spoilt_state_stays_spoilt_to_the_end_of_its_document() -> None:
    tokens, state = tokens_of(), random_state()
    bad = SlotState(state.keys, state.values.at[0, 2, 0, 0].set(jnp.nan), state.document)
    out, after = whole(tokens, one_document(), bad)
    for x in (out.swapaxes(1, 2), after.keys, after.values):
        spoilt = np.isnan(x).all((2, 3))
        assert spoilt[0, 2] and spoilt.sum() == 1 and np.isnan(x).sum() == x[0, 2].size
    assert np.isfinite(whole(tokens, 2 * one_document(), bad)[0]).all()


def test_documents_do_not_see_each_other() -> None:
    ids, tokens, other = packed(), tokens_of(), tokens_of(seed=1)
    changed = jax.tree.map(lambda x, y: jnp.where((ids == 2)[..., None, None], 10 * y, x), tokens, other)
    before, after = (np.asarray(whole(x, ids, random_state())[0]) for x in (tokens, changed))
    np.testing.assert_array_equal(before[ids != 2], after[ids != 2])


def test_an_output_depends_on_no_later_token() -> None:
    gradients, _ = with_gradients(xla, tokens_of(), one_document(), random_state(), jnp.ones(T).at[27:].set(0))
    for x in gradients[0].values():
        assert np.asarray(x)[:, :27].any() and not np.asarray(x)[:, 27:].any()


def on_devices(tokens: Tokens, ids: Any, state: SlotState) -> tuple[jax.Array, SlotState]:
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    along = P(None, "sequence")
    body = partial(run, chunk=4, sequence_axis="sequence")
    in_specs = (along, along, P())
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=(along, P()), check_vma=False)(
        tokens, ids, state
    )


def test_eight_devices_are_one() -> None:
    state = random_state(document=2)
    tokens = tokens_of()
    # Six tokens on a device, a chunk and a half. Documents over devices; devices of padding, amid and behind.
    ids = jnp.asarray([[2] * 4 + [3] * 3 + [0] * 14 + [3] * 6 + [4] * 15 + [0] * 6, [2] * T], jnp.int32)
    one, many = (with_gradients(f, tokens, ids, state, jnp.ones(T)) for f in (xla, on_devices))
    close(many, one, 2e-4)
    spoilt = tokens | {"k": tokens["k"].at[:, 7, 1].set(jnp.nan).at[0, 3, 0].set(jnp.nan)}
    one, many = (with_gradients(f, spoilt, ids, state, jnp.ones(T))[1] for f in (xla, on_devices))
    assert np.isnan(one[0]).any() and np.isnan(one[1].values).any()
    for alone, parts in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(np.isnan(alone), np.isnan(parts))


REFUSED = {
    "v has shape": lambda t: (t | {"v": t["v"][0]}, {}),
    "log_forget has shape": lambda t: (t | {"log_forget": t["log_forget"][:, :3]}, {}),
    r"it must be \[B T H M\]": lambda t: (t | {"log_forget": t["log_forget"][..., 0]}, {}),
    "the key heads must divide": lambda t: (t | {"q": t["q"][:, :, [0, 1, 0]], "k": t["k"][:, :, [0, 1, 0]]}, {}),
    "segment_ids has shape": lambda t: (t, {"ids": one_document()[:, :3]}),
    "chunk is 0": lambda t: (t, {"chunk": 0}),
    r"state.keys has shape \(2, 4, 3, 8\)": lambda t: (t, {"state": init_slot_state(B, H, 3, K, V)}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_by_name(message: str) -> None:
    tokens, options = REFUSED[message](tokens_of())
    with pytest.raises(ValueError, match=message):
        run(tokens, **({"ids": None, "state": None} | options))


def test_types_and_kernels_that_are_not_there_are_refused() -> None:
    tokens = tokens_of()
    with pytest.raises(TypeError, match="state is a tuple; it must be a SlotState"):
        run(tokens, None, (1, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="log_forget is int32"):
        run(tokens | {"log_forget": tokens["log_forget"].astype(jnp.int32)}, None, None)
    with pytest.raises(NotImplementedError, match="this memory has no kernels"):
        run(tokens, None, None, implementation="interpret")


def test_outputs_have_the_type_of_the_values() -> None:
    for length in (1, 3):
        tokens = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tokens_of(length))
        out, after = jax.eval_shape(partial(run, ids=None, state=init_slot_state(B, H, M, K, V)), tokens)
        assert out.dtype == jnp.bfloat16 and after.values.dtype == jnp.float32


def test_values_are_checked_where_asked() -> None:
    from jax.experimental import checkify

    checked = jax.jit(checkify.checkify(lambda tokens, ids: run(tokens, ids, None, check=True)[0]))
    tokens, ids = tokens_of(3), one_document()[:, :3]
    assert checked(tokens, ids)[0].get() is None
    assert "positive" in checked(tokens | {"log_forget": -tokens["log_forget"]}, ids)[0].get()
