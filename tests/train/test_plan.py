"""`hola plan`: what it reads in compiled programs, which meshes it tries, what it says; no chip is needed."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hola_jax.config import parameter_count
from tests.train.processes import ROOT
from tests.train.tiny_run import config as tiny_config
from train import cli
from train.config import RunError
from train.mesh import AXES, MeshConfig, make_mesh
from train.plan import collectives, hlo
from train.plan.chips import CHIPS, target_config
from train.plan.compile import compile_plan, fits
from train.plan.cost import cost
from train.plan.memory import Memory, part_bytes
from train.plan.predict import predict
from train.plan.search import candidates, shapes
from train.plan.show import lines
from train.plan.topology import Topology, parsed, topology

CPU = CHIPS["cpu"]
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
HAS_CUDA = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


def compiled_cost(function, *arguments):
    return cost(hlo.parse(jax.jit(function).lower(*arguments).compile().as_text()), CPU)


def test_products_in_a_loop_count_as_often_as_it_runs():
    def f(x, ws):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    got = compiled_cost(f, jnp.ones((16, 32)), jnp.ones((7, 32, 32)))
    assert got.flops == 7 * 2 * 16 * 32 * 32
    assert not got.unknown


def test_a_loop_whose_rounds_depend_on_values_is_named():
    def f(x):
        return lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ x + 1, x)

    got = compiled_cost(f, jnp.ones((8, 8)))
    assert len(got.unknown) == 1
    assert got.flops == 2 * 8**3


def test_a_loop_reads_the_slices_that_it_takes():
    size = 64 * 1024

    def f(ws):
        return lax.scan(lambda total, w: (total + jnp.sum(w), None), 0.0, ws)[0]

    traffic = compiled_cost(f, jnp.ones((32, size))).traffic
    assert 32 * size * 4 <= traffic < 5 * 32 * size * 4  # each slice once or twice, never all in each round


def talking(x):
    """Every kind of collective: three in a loop of five rounds, two outside."""

    def body(x):
        def step(x, _):
            whole = lax.all_gather(x, "fsdp", axis=0, tiled=True)
            part = lax.psum_scatter(whole * 2, "fsdp", scatter_dimension=0, tiled=True)
            return jnp.sin(lax.psum(part, ("data", "tensor"))), None

        x, _ = lax.scan(step, x, None, length=5)
        x = lax.ppermute(x, "tensor", [(0, 1), (1, 0)])
        return lax.all_to_all(x, "data", split_axis=0, concat_axis=1, tiled=True)

    return body


def test_collectives_are_found_with_axis_count_and_bytes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spec = P(("data", "fsdp", "tensor"))
    f = jax.shard_map(talking(None), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, spec))
    program = hlo.parse(jax.jit(f).lower(x).compile().as_text())
    found = collectives.collectives(cost(program, CPU), mesh, Topology("cpu:8", CPU, (8,), jax.devices()))
    part = 8 * 128 * 4
    assert {(c.kind, c.axes): (c.count, c.bytes) for c in found} == {
        ("all-gather", "fsdp"): (5, 5 * 2 * part),
        ("reduce-scatter", "fsdp"): (5, 5 * 2 * part),
        ("all-reduce", "data x tensor"): (5, 5 * part),
        ("collective-permute", "tensor"): (1, part),
        ("all-to-all", "data"): (1, part),
    }
    assert all(c.exposed == c.seconds > 0 for c in found)


@pytest.mark.parametrize(
    ("attributes", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("sequence",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups=[2,4]<=[8]", ("fsdp", "sequence")),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=1,'sequence'=2] {'data','tensor'}", ("data",)),
        ("replica_groups={}", ("data", "fsdp", "sequence")),
        ("source_target_pairs={{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
    ],
)
def test_groups_of_devices_are_axes_of_the_mesh(attributes, axes):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    instruction = hlo.Instruction(
        "a", "all-reduce", "f32[4]", "%b", f", channel_id=1, {attributes}, metadata={{}}", False
    )
    assert collectives.axes_of(instruction, mesh) == axes


def tpu_program(line):
    return hlo.parse(
        "HloModule m\n\nENTRY %main (a: f32[4,64,32], b: f32[4,32,16]) -> f32[4,64,16] {\n"
        "  %a = f32[4,64,32]{2,1,0:T(8,128)} parameter(0)\n"
        "  %b = f32[4,32,16]{2,1,0:T(8,128)S(1)} parameter(1)\n"
        f"  ROOT %c = f32[4,64,16]{{2,1,0:T(8,128)S(1)}} {line}\n}}\n"
    )


def test_a_batched_product_spelt_as_a_convolution_is_counted_as_the_product():
    line = (
        "convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf, "
        'operand_precision={highest,highest}, backend_config={"estimated_cycles":"1500000"}'
    )
    got = cost(tpu_program(line), CHIPS["v5e"])
    assert got.flops == 4 * 2 * 64 * 32 * 16
    assert got.passes == 6 * got.flops  # float32 with all digits
    assert got.traffic == 4 * 64 * 32 * 4  # `b` and the result lie in fast memory
    assert got.seconds == pytest.approx(1e-3) and got.roofline < 1e-6  # the compiler's own estimate is longer


def test_a_pallas_kernels_operations_are_those_declared_and_its_bytes_those_of_its_arrays():
    line = (
        'custom-call(%a, %b), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":'
        '{"cost_estimate":{"flops":"8000","bytes_accessed":"1"}}}'
    )
    plain, exact = tpu_program(line), tpu_program(line)
    kernel = exact.entry.instructions.pop("c")
    exact.entry.instructions["c"] = dataclasses.replace(kernel, name="delta_rule_forward.1")
    got, passed = cost(plain, CHIPS["v5e"]), cost(exact, CHIPS["v5e"])
    assert got.flops == got.passes == passed.flops == 8000 and passed.passes == 6 * 8000
    assert got.traffic == 4 * 64 * 32 * 4  # `b` and the result lie in fast memory


def fake(**fields):
    return types.SimpleNamespace(**fields)


def test_a_ring_of_the_torus_is_faster_than_a_line_of_it():
    devices = [fake(coords=(x, y)) for x in range(16) for y in range(16)]
    pod = Topology("v5e:16x16", CHIPS["v5e"], (16, 16), devices)
    speed = CHIPS["v5e"].link * CHIPS["v5e"].memory_efficiency
    assert collectives.bandwidth(pod, np.array(devices)) == 4 * speed
    assert collectives.bandwidth(pod, np.array(devices[:16])) == 2 * speed
    assert collectives.bandwidth(pod, np.array(devices[:8])) == speed


def test_gpus_of_several_hosts_share_their_cards():
    devices = [fake(process_index=host) for host in range(4) for _ in range(8)]
    nodes = Topology("h200:4x8", CHIPS["h200"], (4, 8), devices)
    assert collectives.bandwidth(nodes, np.array(devices[:8])) == 450e9 * 0.8
    assert collectives.bandwidth(nodes, np.array(devices)) == 400e9 * 0.8
    assert collectives.bandwidth(nodes, np.array(devices[::8])) == 50e9 * 0.8


def test_collectives_that_run_beside_kernels_cost_what_exceeds_them():
    spent = dataclasses.replace(
        compiled_cost(lambda x: x @ x, jnp.ones((64, 64))), seconds=3.0, roofline=2.0, kernels=0
    )
    talk = [
        collectives.Collective("all-gather", "fsdp", 1, 1.0, seconds=5.0, exposed=0.0),
        collectives.Collective("all-reduce", "data", 1, 1.0, seconds=0.5, exposed=0.5),
    ]
    got = predict(spent, talk, Topology("cpu:1", CPU, (1,), [None]), 1e11)
    assert (got.kernels, got.exposed, got.step) == (3.0, 2.5, 5.5)
    assert got.mfu == pytest.approx(1 / 5.5)


def test_it_fits_where_the_sum_of_all_kinds_is_at_most_the_chips():
    needed = Memory(1, 2, 3, 4, 5, 6, 7, 8)
    assert fits(needed, 36) and not fits(needed, 35)


def test_a_compiler_that_finds_no_room_is_an_answer_and_other_errors_are_errors(monkeypatch):
    def refuse(self, rows, tokens):
        raise jax.errors.JaxRuntimeError(reason)

    monkeypatch.setattr("train.step.Training.lower", refuse)
    reason = "RESOURCE_EXHAUSTED: Ran out of memory on HBM: 22.75G needed, 15.75G there.\nand more"
    plan = compile_plan(tiny_config("run"), MeshConfig(), place())
    assert not plan.fits and plan.prediction is None
    said = "\n".join(lines(plan, place()))
    assert "does not fit: RESOURCE_EXHAUSTED" in said and "and more" not in said and "--microbatches" in said
    reason = "UNIMPLEMENTED: no such operation"
    with pytest.raises(RunError, match="does not compile for cpu:8: UNIMPLEMENTED"):
        compile_plan(tiny_config("run"), MeshConfig(), place())


def place(name="cpu:8"):
    return topology(name)


def test_the_search_takes_only_meshes_that_divide_model_and_batch():
    assert len(shapes(8)) == 20 and all(np.prod(shape) == 8 for shape in shapes(8))
    config = dataclasses.replace(tiny_config("run"), global_batch=8, microbatches=2)  # 2 heads; rows of 2 blocks
    found = [each.mesh for each in candidates(config, place())]
    assert found and all(mesh.tensor <= 2 and mesh.sequence <= 2 and mesh.data * mesh.fsdp <= 4 for mesh in found)
    assert {tuple(getattr(mesh, axis) for axis in AXES) for mesh in found} >= {(4, 1, 1, 2), (2, 2, 2, 1), (1, 2, 2, 2)}


def test_the_search_prefers_what_may_fit():
    config = tiny_config("run")
    big = dataclasses.replace(config, model=dataclasses.replace(config.model, dim=1024, layers=16, mlp_dim=4096))
    small = dataclasses.replace(place(), chip=dataclasses.replace(CPU, memory=900e6))
    wide = candidates(big, place())[0]
    tight = candidates(big, small)[0]
    assert wide.bytes > small.chip.memory >= tight.bytes
    assert tight.mesh.fsdp > 1


CONFIG = 'from tests.train.tiny_run import config as make\n\nconfig = make("run")\n'


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return str(path)


def test_a_plan_of_host_devices_says_and_saves_everything(config_file, tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["plan", config_file, "--topology", "cpu:8", "--mesh.data=2", "--mesh.fsdp=4", f"--out={out}"]
    cli.main(arguments)
    said = capsys.readouterr().out
    for word in (
        "mesh data 2 x fsdp 4",
        "optimizer moments",
        "fits:",
        "all-gather",
        "predicted, not measured",
        "MFU",
        "there are no kernels for cpu",
    ):
        assert word in said
    saved = json.loads(out.read_text())
    plan, model = saved["best"], tiny_config("run").model
    assert saved["fits"] and plan["report"]["parameters"] == parameter_count(model)["total"]
    assert plan["memory"]["moments"] == 2 * plan["memory"]["parameters"]
    assert 0.8 < plan["executed"] * 8 / plan["report"]["analytic_flops"] < 2  # small shapes: much besides the products
    gathered = next(c for c in plan["collectives"] if (c["kind"], c["axes"]) == ("all-gather", "fsdp"))
    assert gathered["bytes"] > 2 * plan["memory"]["parameters"]
    assert saved["command"] == " ".join(["hola", *arguments]) and not plan["unknown_loops"]


def test_without_a_mesh_the_best_is_searched(config_file, capsys):
    cli.main(["plan", config_file, "--topology=cpu:2", "--compile=1", "--global-batch=4"])
    said = capsys.readouterr()
    assert "meshes divide model and batch" in said.out and "compiling 1 of 1" in said.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--topology=v5x:4x4"], "did you mean 'v5"),
        (["--topology=v5p"], "such as v5e:16x16"),
        (["--topology=v5p:4x4"], "v5p takes 3 positive sizes"),
        (["--topology=h200:8"], "h200 takes 2 positive sizes"),
        (["--topology=cpu:8", "--compile=0"], "--compile is 0"),
        (["--topology=cpu:8", "--optimizer.peek=1"], "did you mean --optimizer.peak?"),
        (["--topology=cpu:8", "--mesh.data=3"], "does not use 8 devices exactly"),
        (["--topology=cpu:8", "--global-batch=7"], "no mesh of 8 chips divides"),
        (["--topology=cpu:99"], "needs 99 host devices"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_said(config_file, arguments, reason):
    with pytest.raises(SystemExit) as error:
        cli.main(["plan", config_file, *arguments])
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("name", "installed", "missing"),
    [("v5p:4x4x4", HAS_LIBTPU, "pip install libtpu"), ("h200:4x8", HAS_CUDA, "jax-cuda13-plugin==")],
)
def test_a_compiler_that_is_missing_is_named(config_file, name, installed, missing):
    if installed:
        pytest.skip("it is installed here")
    with pytest.raises(SystemExit) as error:
        cli.main(["plan", config_file, f"--topology={name}"])
    assert missing in str(error.value)


def test_the_description_of_a_gpu_names_it_and_a_tpu_has_none():
    assert 'device_description_str: "NVIDIA H200"' in target_config("h200")
    with pytest.raises(ValueError, match="v5p is no GPU"):
        target_config("v5p")
    assert parsed("h200:4x8") == ("h200", (4, 8))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "installed"), [("v5e:2x2", HAS_LIBTPU), ("h200:1x4", HAS_CUDA)])
def test_the_step_compiles_for_chips_that_are_not_there(config_file, name, installed):
    if not installed:
        pytest.skip("its compiler (libtpu, or JAX's CUDA plugin) is not installed")
    command = [sys.executable, "-m", "train.cli", "plan", config_file, f"--topology={name}", "--mesh.fsdp=4"]
    # In a process of its own: this one has made its backends, and takes no further plugin.
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "fits:" in done.stdout and "fsdp" in done.stdout


def test_bytes_of_a_part_follow_the_sharding():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    tree = {"a": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", "data")))}
    assert part_bytes(tree) == 2 * 8 * 4
