"""The step: any mesh of eight devices is one device, microbatches are the batch, and what is not finite is skipped.

To compile a step for a mesh takes longer than anything that is done with it: every case is one program, compiled once.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hola_jax.config import flops_per_token, parameter_count
from tests.laws.mixers import MIXERS
from tests.train.small import ROWS, TOKENS, batch, one_device, trace, training
from train import optimizer
from train.mesh import MeshConfig
from train.optimizer import OptimizerConfig
from train.report import report

TOLERANCE = 1e-5  # relative: float32 sums in another order, 10 steps long
SHAPES = {
    "data 8": MeshConfig(data=8),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp 2, tensor 2, sequence 2": MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
}
ALL_CUT = "fsdp 2, tensor 2, sequence 2"
# HOLA's other shapes are in the two tests behind: in microbatches, and by kernels; and in two processes, its sequence cut by
# XLA (test_two_processes.py). What a sequence in eight parts gives, each memory says of itself: laws/test_devices.py,
# memory/test_linear.py and test_slots.py, layers/test_attention.py.
CASES = [("hola", "data 8")]
# LoLA's sequence cannot be cut. Of these the others are parts, or go the same ways with other numbers: their forward pass is
# compared alone.
CASES += [(mixer, ALL_CUT) for mixer in ("kda", "gsa", "transformer")]
CASES += [("lola", "data 2, fsdp 2, tensor 2")]
FORWARD = [mixer for mixer in MIXERS if mixer not in dict(CASES)]


def layers(mixer):
    """One compiles sooner than two, and that layers are stacked HOLA has shown."""
    return {"layers": 2 if mixer == "hola" else 1}


@functools.cache
def program(mixer="hola", shape=None):
    """(the training, its step compiled) on a mesh of SHAPES, or on one device."""
    options = {"fields": layers(mixer)}
    train = one_device(mixer, **options) if shape is None else training(SHAPES[shape], mixer, **options)
    return train, train.lower(ROWS, TOKENS).compile()


@functools.cache
def numbers(mixer):
    """The state before the first step, as one device makes it. Any mesh makes the same, which one test says of one."""
    return jax.device_get(program(mixer)[0].layout.init(0))


@functools.cache
def expected(mixer):
    return losses(mixer, *program(mixer))


def losses(mixer, train, compiled, **options):
    state = jax.device_put(numbers(mixer), train.layout.state_shardings)
    return [metrics["loss"] for metrics in trace(train, compiled, state=state, **options)[0]]


@pytest.fixture(scope="module", autouse=True)
def programs_of_this_file():
    yield
    program.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(("mixer", "shape"), CASES)
def test_any_mesh_gives_the_losses_of_one_device(mixer, shape):
    got = losses(mixer, *program(mixer, shape))
    np.testing.assert_allclose(got, expected(mixer), rtol=TOLERANCE)
    assert len(set(got)) > 7  # it moves


@pytest.mark.slow
@pytest.mark.parametrize("mixer", FORWARD)
def test_any_mesh_gives_the_held_out_loss_of_one_device(mixer):
    found = []
    for train in (training(SHAPES[ALL_CUT], mixer, fields={"layers": 1}), one_device(mixer, fields={"layers": 1})):
        compiled = train.lower_evaluation(ROWS, TOKENS).compile()
        params = train.layout.init(0)["params"]
        found.append(compiled(params, jax.device_put(batch(0), train.layout.batch_sharding)))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE)


@pytest.mark.slow
def test_state_and_metrics_of_a_step_lie_where_the_sharding_table_says():
    train, compiled = program("lola", "data 2, fsdp 2, tensor 2")
    state = train.layout.init(0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state, numbers("lola"))
    state, metrics = compiled(state, jax.device_put(batch(0), train.layout.batch_sharding))
    query = state["params"]["blocks"]["mixer"]["query"]["kernel"]
    assert query.sharding.spec == P(None, "fsdp", "tensor")
    assert query.addressable_shards[0].data.shape == (1, 16, 8)
    for name in ("mu", "nu"):
        same = jax.tree.map(lambda p, m: p.sharding == m.sharding, state["params"], state["optimizer"][name])
        assert all(jax.tree.leaves(same))
    assert all(x.sharding.is_fully_replicated for x in metrics.values())
    wanted = train.layout.state_shardings
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, wanted)))


@pytest.mark.slow
def test_kernels_on_a_mesh_give_the_losses_of_one_device():
    """By the interpreter: parameters in parts, heads along tensor, tokens along sequence."""
    train = training(SHAPES[ALL_CUT], fields={"implementation": "interpret"})
    assert train.layout.choice.name == "interpret" and "asked for; state and cache in two" in train.layout.choice.why
    got = losses("hola", train, train.lower(ROWS, TOKENS).compile(), steps=5)
    np.testing.assert_allclose(got, expected("hola")[:5], rtol=TOLERANCE)


def test_a_sequence_cut_over_devices_is_refused_where_blocks_need_those_before():
    train = training(SHAPES[ALL_CUT], "lola")
    with pytest.raises(
        NotImplementedError, match=r"LoLA scores its pairs anew .* mesh axis 'sequence'; divide the batch"
    ):
        train.lower(ROWS, TOKENS)


def test_a_mesh_whose_tensor_axis_does_not_divide_the_heads_is_refused_where_kernels_are_asked_for():
    train = training(MeshConfig(data=2, tensor=4), fields={"implementation": "interpret"})
    with pytest.raises(NotImplementedError, match="2 value heads and 2 key heads do not divide over 4 devices"):
        train.lower(ROWS, TOKENS)


@pytest.mark.slow
def test_microbatches_and_remat_on_a_mesh_change_nothing():
    """The other kind of remat is in test_model.py, on one device."""
    shape = SHAPES["data 2, fsdp 2, tensor 2"]
    train = training(shape, microbatches=2, fields={"remat": "full"}, loss_chunk=24)
    got = losses("hola", train, train.lower(ROWS, TOKENS).compile())
    np.testing.assert_allclose(got, expected("hola"), rtol=TOLERANCE)


def test_what_is_not_finite_is_skipped_and_counted():
    train, compiled = program("transformer")
    state = train.layout.init(0)
    before = jax.tree.map(np.asarray, state)
    spoilt = batch(0)
    spoilt["tokens"][0, 5] = 64  # no such token: NaN
    state, metrics = compiled(state, spoilt)
    assert np.isnan(metrics["loss"]) and metrics["skipped"] == 1 and state["step"] == 1
    for name in ("params", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, state[name], before[name])
    state, metrics = compiled(state, batch(0))
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 1 and state["skipped"] == 1
    assert not np.array_equal(state["params"]["embedding"], before["params"]["embedding"])


def test_a_batch_without_a_token_that_counts_changes_nothing_but_decay():
    train, compiled = program("transformer")
    empty = batch(0)
    empty["mask"][:] = False
    _, metrics = compiled(train.layout.init(0), empty)
    assert metrics["loss"] == 0 and metrics["tokens"] == 0 and metrics["gradient_norm"] == 0


def test_the_learning_rate_warms_up_and_ends_at_a_tenth():
    recipe = OptimizerConfig(warmup=10)
    rates = [float(recipe.learning_rate(step, 100)) for step in range(100)]
    np.testing.assert_allclose(rates[0], 4e-5, rtol=1e-5)
    np.testing.assert_allclose([max(rates), rates[9], rates[-1]], [4e-4, 4e-4, 4e-5], rtol=1e-5)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_the_caches_own_parameters_may_learn_faster():
    params = {"mixer": {"cache": {"gate_logit": jnp.ones(2)}, "query": jnp.ones(3)}}
    decayed = {"mixer": {"cache": {"gate_logit": False}, "query": False}}
    moved = {}
    for factor in (1.0, 4.0):
        config = OptimizerConfig(cache_rate=factor)
        after, _ = optimizer.update(config, params, optimizer.init(params), params, decayed, jnp.float32(0.01))
        moved[factor] = jax.tree.map(lambda new, old: float((old - new)[0]), after, params)["mixer"]
    assert moved[1.0]["query"] == moved[4.0]["query"] == pytest.approx(0.01)
    assert moved[4.0]["cache"]["gate_logit"] == pytest.approx(4 * moved[1.0]["cache"]["gate_logit"], rel=1e-5)


def test_a_recipe_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.b1 is 1\.0; it must be at least 0 and below 1"):
        OptimizerConfig(b1=1.0)


def test_the_report_counts():
    train, compiled = program("hola")
    found = report(compiled, train.layout, ROWS, TOKENS, 1.5)
    model = train.layout.model
    assert found.parameters == parameter_count(model)["total"]
    assert found.argument_bytes >= 3 * 4 * found.parameters and found.aliased_bytes >= 3 * 4 * found.parameters
    assert found.analytic_flops == 3 * flops_per_token(model, TOKENS) * ROWS * TOKENS
    assert "implementation  xla: there are no kernels for cpu" in found.lines()


def communicated(compiled):
    """Bytes of the results of all-gathers and the like, each once."""
    lines = [
        line.split(" = ", 1)[1] for line in compiled.as_text().splitlines() if re.search(r"= .* all-gather\(", line)
    ]
    shapes = [re.findall(r"\[([\d,]*)\]", line.split(" all-gather(")[0]) for line in lines]
    return sum(int(np.prod([int(n) for n in shape.split(",") if n])) for found in shapes for shape in found)


@pytest.mark.slow
def test_data_parallel_gathers_nothing():
    assert communicated(program("hola", "data 8")[1]) == 0
