"""Which implementation runs: what the platform's kernels take, what they refuse and why, and a word in the log."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hola_jax import preset
from hola_jax.config import memory_work
from hola_jax.memory import CacheParams, MemoryConfig, hola_memory, init_state, linear_memory
from hola_jax.memory import kernels as choosing
from hola_jax.memory.kernels import choose, token_kernels

PAPER = memory_work(preset("hola-340m"))
BY_ATTENTION = dataclasses.replace(preset("hola-340m"), memory=MemoryConfig(score="attention"))


def on_tpu(work, asked=None, parts=1):
    return choose(asked, work, platform="tpu", parts=parts)


@pytest.mark.parametrize("name", ["hola-340m", "gdn-340m", "hola-46m", "deltanet-170m"])
def test_the_papers_shapes_run_by_kernels_on_a_tpu(name):
    work = memory_work(preset(name))
    how = ("; the whole memory in one kernel", True) if work.window else ("", False)
    assert on_tpu(work) == ("pallas_tpu", f"tpu kernels take this shape{how[0]}", how[1])
    assert on_tpu(work, "pallas", parts=4) == on_tpu(work, "pallas_tpu") == ("pallas_tpu", f"asked for{how[0]}", how[1])


APART = {
    "window=600.* need about .* MiB on the chip": {"window": 600},
    "depends on the scores of the devices before it": {"axis": "sequence"},
}


@pytest.mark.parametrize("reason", APART)
def test_a_memory_that_one_kernel_does_not_take_runs_by_two_which_is_known_before_and_said(reason):
    change = dict(APART[reason])
    axis = change.pop("axis", None)
    work = PAPER._replace(**change)
    for asked in (None, "pallas", "pallas_tpu"):
        found = choose(asked, work, axis, platform="tpu", parts=1)
        assert found.name == "pallas_tpu" and not found.fused
        assert re.search(f"state and cache in two kernels: .*{reason}", found.why), found.why
        assert choosing.kernels(found).hola is None


def test_what_an_earlier_piece_leaves_needs_room_beside_the_rest():
    exact = PAPER._replace(dtypes=("float32",) * 3, window=96)
    assert on_tpu(exact).fused and not on_tpu(exact._replace(continued=True)).fused


class Device:
    def __init__(self, platform, **facts):
        self.platform = platform
        self.__dict__.update(facts)


def test_a_gpus_kernels_are_hoppers_and_take_bfloat16():
    hopper = choosing.platform_of(Device("gpu", compute_capability="9.0"))
    how = "; state and cache in two kernels: the platform has no other"
    assert choose(None, PAPER, platform=hopper, parts=1) == ("pallas_gpu", f"gpu kernels take this shape{how}", False)
    assert choose("pallas", PAPER, platform=hopper, parts=2) == ("pallas_gpu", f"asked for{how}", False)
    exact = PAPER._replace(dtypes=("float32",) * 3)
    assert "float32; the Mosaic GPU delta rule takes bfloat16" in choose(None, exact, platform=hopper, parts=1).why
    with pytest.raises(NotImplementedError, match="window=2048: the GPU kernel keeps 1 to 1024 rows"):
        choose("pallas_gpu", PAPER._replace(window=2048), platform=hopper, parts=1)
    for capability in ("8.0", "10.0", "gfx942"):
        other = choosing.platform_of(Device("gpu", compute_capability=capability))
        assert (
            f"no kernels for a GPU of compute capability {capability}"
            in choose(None, PAPER, platform=other, parts=1).why
        )
        with pytest.raises(NotImplementedError, match="kernels are for Hopper"):
            choose("pallas", PAPER, platform=other, parts=1)
    assert choosing.platform_of(Device("tpu")) == "tpu"


NO_KERNEL = {
    "K is 96; .* takes 64, 128 or 256": PAPER._replace(key_dim=96),
    "float16": PAPER._replace(dtypes=("float16",) * 3),
    "window=4096.* MiB on the chip": PAPER._replace(window=4096),
    "window=0 keeps no cache": PAPER._replace(window=0),
    "not one per key channel": memory_work(preset("kda-340m")),
    "does not write by the delta rule": memory_work(preset("gla-340m")),
    "score='attention' is decided anew at each block's end": memory_work(BY_ATTENTION),
}


@pytest.mark.parametrize("reason", NO_KERNEL)
def test_what_the_kernels_do_not_take_runs_by_xla_with_the_reason_and_is_refused_where_asked_for(reason):
    work = NO_KERNEL[reason]
    found = on_tpu(work)
    assert found.name == "xla" and re.search(reason, found.why), found.why
    for asked in ("pallas", "pallas_tpu"):
        with pytest.raises(NotImplementedError, match=f"implementation='{asked}': .*({reason})"):
            on_tpu(work, asked)


def test_a_sequence_is_not_cut_where_blocks_need_those_before_and_that_is_the_reason_given():
    memory = MemoryConfig(fade=64.0, budget=8)
    work = memory_work(dataclasses.replace(preset("hola-340m"), memory=memory))
    with pytest.raises(NotImplementedError, match=r"^budget=8 is decided anew at each block's end: what a block finds"):
        choose(None, work, "sequence", platform="tpu", parts=1)


def test_a_share_of_the_read_runs_by_a_tpus_kernels_untrained_and_elsewhere_by_xla():
    work = memory_work(dataclasses.replace(preset("hola-340m"), memory=MemoryConfig(read_energy=0.9)))
    assert on_tpu(work) == on_tpu(PAPER) and on_tpu(work, "pallas") == on_tpu(PAPER, "pallas")
    assert token_kernels("pallas_tpu", work) is not None
    for platform, change, reason in (
        ("tpu", {"trained": True}, "read_energy=0.9 drops entries of each read, whose gradient no kernel gives"),
        ("gpu", {}, "energy=0.9: the GPU kernel weighs entries as it meets them"),
    ):
        found = choose(None, work._replace(**change), platform=platform, parts=1)
        assert found.name == "xla" and reason in found.why
        with pytest.raises(NotImplementedError, match=reason):
            choose("pallas", work._replace(**change), platform=platform, parts=1)
    assert on_tpu(PAPER._replace(trained=True)) == on_tpu(PAPER)


def test_a_single_token_that_runs_by_something_else_is_told_of():
    """A TPU's kernel of one token wants 16 rows to a tile, a GPU's 64; those of a sequence do not."""
    for platform, window, words in (
        ("tpu", 24, "a window of a multiple of 16"),
        ("gpu", 80, "window=80: the GPU step"),
    ):
        work = PAPER._replace(window=window)
        for asked, why in ((None, f"{platform} kernels take this shape"), ("pallas", "asked for")):
            found = choose(asked, work, platform=platform, parts=1)
            assert found.name == f"pallas_{platform}"
            assert re.match(f"{why}; .*; a single token runs by xla: .*{words}", found.why), found.why
        assert token_kernels(found.name, work) is None
        assert token_kernels(found.name, PAPER) is not None
    assert token_kernels("xla", PAPER) is None
    assert token_kernels("interpret", PAPER._replace(window=24)) is not None


def test_a_platform_without_kernels_is_named():
    assert choose(None, PAPER, platform="rocm", parts=1) == ("xla", "there are no kernels for rocm", False)
    for asked in ("pallas", "pallas_tpu"):
        with pytest.raises(NotImplementedError, match=f"{asked}': there are kernels for .*tpu.*, and this is rocm"):
            choose(asked, PAPER, platform="rocm", parts=1)


def test_heads_that_do_not_divide_over_devices_are_no_work_for_kernels():
    assert "do not divide over 3 devices" in on_tpu(PAPER, parts=3).why
    with pytest.raises(NotImplementedError, match="do not divide over 3 devices"):
        on_tpu(PAPER, "pallas", parts=3)


def traced(implementation=None, width=64, window=16):
    """The jaxpr of a bare call whose shapes the kernels take; nothing is computed."""
    shapes = [(1, 128, 2, width)] * 3 + [(1, 128, 2)] * 2
    params = CacheParams(*[jax.ShapeDtypeStruct((n,), jnp.float32) for n in (width, width, 2, 2)])

    def run(arrays, params):
        config = MemoryConfig(window=window, block=128)
        return hola_memory(*arrays, params, config=config, implementation=implementation)

    return str(jax.make_jaxpr(run)([jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes], params))


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    monkeypatch.setattr(choosing, "platform_here", lambda: "tpu")
    choosing._say_once.cache_clear()


def test_a_bare_call_takes_the_kernels_of_a_single_tpu(as_on_a_tpu, monkeypatch, caplog):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with caplog.at_level(logging.INFO, "hola_jax"):
        assert all("pallas_call" in traced() for _ in range(2))
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "the memory runs by pallas_tpu: tpu kernels take this shape; the whole memory in one kernel")
    ]


def test_a_bare_call_runs_what_the_choice_says(as_on_a_tpu, monkeypatch, caplog):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert "hola_forward" in traced() and "delta_rule_forward" not in traced()
    with caplog.at_level(logging.INFO, "hola_jax"):
        for asked in (None, "pallas"):
            text = traced(asked, window=480, width=256)
            assert "delta_rule_forward" in text and "hola_cache_forward" in text and "hola_forward" not in text
    assert len(caplog.records) == 2 and all("in two kernels: window=480" in r.message for r in caplog.records)


def test_a_bare_call_beside_several_tpus_runs_by_xla_and_says_so(as_on_a_tpu, caplog):
    assert "pallas_call" not in traced()
    assert "pallas_call" in traced("pallas")
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "the memory runs by xla: there are 8 devices and no shard_map" in caplog.text


def test_a_call_in_a_shard_map_takes_kernels_and_heads_go_by_the_axes_left(as_on_a_tpu):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(2, 128, 4, 64)] * 3 + [(2, 128, 4)] * 2]

    def run(*arrays):
        return linear_memory(*arrays, scale=1.0)[0]

    split = {"in_specs": P("data"), "out_specs": P("data"), "check_vma": False}
    text = str(jax.make_jaxpr(jax.shard_map(run, mesh=mesh, axis_names={"data"}, **split))(*shapes))
    assert text.count("shard_map") == 2 and "pallas_call" in text
    assert "f32[1,128,128]" in text  # one head of 64, padded to 128 lanes, on each device
    assert "f32[1,128,512]" not in text  # ... and not four
    few = [jax.ShapeDtypeStruct((*x.shape[:2], 2, *x.shape[3:]), jnp.float32) for x in shapes]
    text = str(jax.make_jaxpr(jax.shard_map(run, mesh=mesh, axis_names={"data"}, **split))(*few))
    assert "pallas_call" not in text  # two heads do not divide over four devices


def test_a_bare_call_hears_why_a_tpus_kernels_cannot_run_without_one():
    with pytest.raises(NotImplementedError, match="K is 96; the Pallas delta rule takes 64, 128 or 256"):
        traced("pallas_tpu", width=96)
    assert "pallas_call" in traced("pallas_tpu")


def test_the_default_device_decides_for_a_bare_call():
    with jax.default_device(jax.devices("cpu")[1]):
        assert choosing.platform_here() == "cpu"
    with jax.default_device("cpu"):
        assert choosing.platform_here() == "cpu"


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_one_token_runs_by_the_platforms_kernel_and_its_gradient_by_xla(implementation):
    """Traced, not compiled: the gradient's program has the kernels of the forward pass and no more."""
    if implementation == "pallas_gpu" and jax.__version_info__ < (0, 11):
        pytest.skip("the GPU kernels are written for jax 0.11 and newer")
    config = MemoryConfig(window=64, block=128)
    state = jax.eval_shape(lambda: init_state(config, 1, 2, 64, 64, jnp.bfloat16))
    tokens = [jax.ShapeDtypeStruct((1, 1, 2, 64), jnp.bfloat16)] * 3 + [
        jax.ShapeDtypeStruct((1, 1, 2), jnp.float32)
    ] * 2
    params = CacheParams(*[jax.ShapeDtypeStruct((n,), jnp.float32) for n in (64, 64, 2, 2)])

    def loss(tokens, params, state):
        out, after = hola_memory(*tokens, params, config=config, state=state, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(after.fast_weights)

    forward, both = (str(jax.make_jaxpr(run)(tokens, params, state)) for run in (loss, jax.grad(loss, argnums=(0, 1))))
    calls = forward.count("name=hola_step")
    assert calls == both.count("name=hola_step") and calls >= 1
