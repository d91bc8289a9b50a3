"""`hola plan CONFIG --topology v5p:4x4x4`: reads the command line, compiles, prints, saves."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from train.config import TrainConfig, as_dict
from train.mesh import AXES, MeshConfig
from train.overrides import load as load_config
from train.overrides import override, pairs
from train.plan.compile import Plan, compile_plan
from train.plan.search import Candidate, candidates
from train.plan.show import estimates, lines, table
from train.plan.topology import EXAMPLES, Topology, topology
from train.whole import write_whole

ABOUT = f"""Compiles the training step that CONFIG describes for chips that are not there, and says what each of them needs.
Settings are changed by name as in `hola train`, such as --global-batch=512 --mesh.fsdp=16 --model.remat=full.
Topologies: {EXAMPLES}.
TPUs need libtpu (pip install libtpu), GPUs JAX's CUDA plugin; neither needs the device."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("hola plan", description=ABOUT, allow_abbrev=False)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("config", metavar="CONFIG", help="a Python file, such as configs/hola_340m.py")
    made.add_argument("--topology", required=True, metavar="CHIP:SIZES", help="such as v5p:4x4x4 or h200:4x8")
    made.add_argument("--search", action="store_true", help="look for the best mesh; done anyway where none is given")
    made.add_argument("--compile", type=int, default=3, metavar="N", help="meshes that a search compiles (default 3)")
    made.add_argument("--out", type=Path, metavar="FILE", help="save what was found as JSON")
    made.add_argument(
        "--program", type=Path, metavar="FILE", help="save the compiled program's text (of the last mesh)"
    )
    return made


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def chosen(
    config: TrainConfig, place: Topology, count: int, program: Path | None
) -> tuple[list[Plan], list[Candidate]]:
    """The plans of the `count` most promising meshes, and all candidates."""
    found = candidates(config, place)
    if not found:
        raise ValueError(
            f"no mesh of {len(place.devices)} chips divides this model and global_batch={config.global_batch} in "
            f"{config.microbatches} microbatches; choose another global_batch, fewer microbatches or another topology"
        )
    plans = []
    for number, each in enumerate(found[:count], 1):
        say(f"compiling {number} of {min(count, len(found))}: {mesh_name(each.mesh)}")
        plans.append(compile_plan(config, each.mesh, place, program))
    return plans, found


def mesh_name(mesh: MeshConfig) -> str:
    return " x ".join(f"{name} {getattr(mesh, name)}" for name in AXES if getattr(mesh, name) != 1) or "one device"


def best(plans: list[Plan]) -> Plan:
    """The fastest that fits; where none does, the one that is nearest to it."""
    fitting = [plan for plan in plans if plan.fits and plan.prediction]
    if fitting:
        return min(fitting, key=lambda plan: plan.prediction.step if plan.prediction else 0.0)
    return min(plans, key=lambda plan: plan.memory.total if plan.memory else float("inf"))


def save(path: Path, config: TrainConfig, found: Plan, plans: list[Plan], arguments: list[str]) -> None:
    """Everything that was found, with the command that finds it again."""
    values = {
        "command": " ".join(["hola", "plan", *arguments]),
        "fits": found.fits,
        "best": dataclasses.asdict(found),
        "compiled": [dataclasses.asdict(plan) for plan in plans],
        "config": as_dict(config),
    }
    write_whole(path, json.dumps(values, indent=2) + "\n")


def plan(arguments: list[str]) -> int:
    """`hola plan`; the exit code is 0 where a mesh fits and 1 where none does."""
    options, rest = parser().parse_known_args(arguments)
    if options.compile < 1:
        raise ValueError(f"--compile is {options.compile}; it must be at least 1")
    config, given = load_config(options.config), pairs(rest)
    for name, value in given:
        config = override(config, name, value)
    place = topology(options.topology)
    meshed = config.mesh != MeshConfig(slices=config.mesh.slices) or any(name.startswith("mesh.") for name, _ in given)
    if options.search or not meshed:
        plans, found = chosen(config, place, options.compile, options.program)
        print("\n".join(estimates(found, options.compile, place)))
        print("\n".join(table(plans)) + "\n")
    else:
        plans = [compile_plan(config, config.mesh, place, options.program)]
    result = best(plans)
    print("\n".join(lines(result, place)))
    if options.out:
        save(options.out, config, result, plans, arguments)
        say(f"saved in {options.out}")
    return 0 if result.fits else 1
