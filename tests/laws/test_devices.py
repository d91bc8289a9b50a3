"""Law 7 for the memory: any mesh of eight devices is one device, and what travels does not grow with the sequence."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hola_jax.memory import MemoryConfig, hola_memory
from tests.laws.cases import (
    FEW,
    OTHER,
    PARAMS,
    RESCORED,
    B,
    assert_close,
    assert_same_state,
    compiled,
    inputs,
    learned,
)

CONFIG = MemoryConfig(window=4, block=8, chunk=4)
TOKENS = 128


def mesh(*shape_and_names):
    shape, names = zip(*shape_and_names, strict=True)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


@functools.cache
def along_sequence(config=CONFIG):
    """hola_memory with T sharded over eight devices: (arrays, segment_ids, state) -> (out, state)."""
    split, whole = P(None, "sequence"), P()

    def run(arrays, segment_ids, state, params):
        return hola_memory(
            *arrays,
            params,
            config=config,
            segment_ids=segment_ids,
            state=state,
            sequence_axis="sequence",
            learned=learned(config, arrays),
        )

    return jax.jit(
        jax.shard_map(
            run,
            mesh=mesh((8, "sequence")),
            in_specs=([split] * 5, split, whole, whole),
            out_specs=(split, whole),
            check_vma=False,
        )
    )


def layout(kind: str):
    segments = np.ones((B, TOKENS), np.int32)
    if kind == "documents":  # one spans several devices, one starts and ends within one; the end is padding
        segments[0, 20:], segments[0, 70:], segments[0, 75:] = 2, 3, 4
        segments[1, 5:], segments[1, 100:] = 7, 0
    return None if kind == "one document" else segments


@pytest.mark.parametrize(
    ("kind", "score"),
    [
        ("documents", "surprise"),
        ("documents", "learned"),
        pytest.param("one document", "fade", marks=pytest.mark.slow),  # of positions, as recency
        pytest.param("one document", "power", marks=pytest.mark.slow),
    ],
)
def test_a_sharded_sequence_is_the_whole_sequence(kind, score):
    config = {"surprise": CONFIG, "fade": dataclasses.replace(CONFIG, fade=9.0), **OTHER}[score]
    arrays, segments = inputs(0, TOKENS), layout(kind)
    out, state = along_sequence(config)(arrays, segments, None, PARAMS)
    expected, expected_state = compiled(config)(arrays, segments)
    assert_close(out, expected)
    assert_same_state(state, expected_state)


@pytest.mark.slow
def test_a_sharded_sequence_continues_a_state():
    _, before = compiled(CONFIG)(inputs(0, TOKENS))
    arrays = inputs(1, TOKENS)
    out, state = along_sequence()(arrays, None, before, PARAMS)
    expected, expected_state = compiled(CONFIG)(arrays, None, before)
    assert_close(out, expected)
    assert_same_state(state, expected_state)


@pytest.mark.oldest
def test_gradients_of_a_sharded_sequence_are_those_of_the_whole():
    arrays, segments = inputs(2, TOKENS), layout("documents")

    def gradient(run):
        return jax.jit(
            jax.grad(lambda arrays, params: jnp.sum(jnp.sin(run(arrays, segments, None, params)[0])), (0, 1))
        )

    got = gradient(along_sequence())(arrays, PARAMS)
    wanted = gradient(compiled(CONFIG))(arrays, PARAMS)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, atol=1e-4)


@pytest.mark.slow
def test_nan_travels_to_the_devices_behind_and_stops_at_the_next_document():
    arrays, segments = inputs(3, TOKENS), layout("documents")
    bad = [*arrays[:2], arrays[2].at[0, 30, 0, 0].set(jnp.nan), *arrays[3:]]
    out, state = along_sequence()(bad, segments, None, PARAMS)
    expected, expected_state = compiled(CONFIG)(bad, segments)
    assert_close(out, expected)
    assert np.isnan(out[0, 30:70, 0]).all() and np.isfinite(out[0, 70:]).all()
    assert_same_state(state, expected_state)


def communicated(tokens: int) -> int:
    """Bytes of all results of all collectives in the compiled program."""
    text = along_sequence().lower(inputs(0, tokens), None, None, PARAMS).compile().as_text()
    width = {"f32": 4, "s32": 4, "bf16": 2, "pred": 1, "u32": 4, "s8": 1}
    total = 0
    for line in text.splitlines():
        if re.search(r"= .* (all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(-start)?\(", line):
            results = line.split(" = ", 1)[1].split("all-", 1)[0]
            for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", results):
                total += width[kind] * int(np.prod([int(n) for n in shape.split(",") if n]))
    return total


@pytest.mark.slow
def test_what_is_communicated_does_not_grow_with_the_sequence():
    few, many = communicated(TOKENS), communicated(4 * TOKENS)
    assert few == many > 0


@pytest.mark.parametrize("config", [CONFIG, *FEW.values()], ids=["surprise", *FEW])
def test_batch_and_heads_may_be_sharded_by_the_compiler(config):
    devices = mesh((4, "data"), (2, "tensor"))
    arrays = inputs(4, 37, batch=4, key_heads=2)
    per_head = NamedSharding(devices, P("data", None, "tensor"))
    placed = [jax.device_put(x, per_head) for x in arrays]
    out, state = compiled(config)(placed)
    expected, expected_state = compiled(config)(arrays)
    assert_close(out, expected)
    assert_same_state(state, expected_state)


@pytest.mark.parametrize("config", RESCORED.values(), ids=RESCORED)
def test_blocks_that_wait_for_each_other_are_not_divided_over_devices(config):
    with pytest.raises(NotImplementedError, match=f"score='{config.score}'.* divide the batch or the heads"):
        along_sequence(config)(inputs(0, TOKENS), None, None, PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize("by_hand", ["sequence", "data"])
def test_kernels_on_parts_of_tokens_or_rows_and_heads_give_what_one_device_gives(by_hand):
    """By the interpreter: tokens or rows by hand, heads along "tensor", which is left to the compiler."""
    tokens, rows = (P(None, "sequence"), P()) if by_hand == "sequence" else (P("data"), P("data"))
    arrays, segments = inputs(5, 32, key_heads=2), layout("documents")[:, :32]
    _, before = compiled(CONFIG)(inputs(4, 16, key_heads=2))
    segments[1, 20:] = 9

    def on_mesh(arrays, segment_ids, state, params):
        def run(*given):
            *arrays, segment_ids, state, params = given
            options = {"segment_ids": segment_ids, "state": state}
            options |= {"sequence_axis": "sequence"} if by_hand == "sequence" else {}
            return hola_memory(*arrays, params, config=CONFIG, implementation="interpret", **options)

        devices = mesh((2, by_hand), (2, "tensor"))
        specs = {"in_specs": (*[tokens] * 6, rows, P()), "out_specs": (tokens, rows)}
        mapped = jax.shard_map(run, mesh=devices, axis_names={by_hand}, check_vma=False, **specs)
        return mapped(*arrays, segment_ids, state, params)

    def gradient(run):
        def loss(arrays, params, weights):
            state = dataclasses.replace(before, fast_weights=weights)
            out, after = run(arrays, segments, state, params)
            kept = jnp.sum(jnp.cos(after.cache_keys)) + jnp.sum(jnp.tanh(after.fast_weights))
            return jnp.sum(jnp.sin(out)) + kept, (out, after)

        of = (arrays, PARAMS, before.fast_weights)
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*of)

    got, (out, after) = gradient(on_mesh)
    wanted, (expected, expected_after) = gradient(compiled(CONFIG))
    assert_close(out, expected)
    assert_same_state(after, expected_after)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, atol=1e-4)
