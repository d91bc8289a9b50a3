"""A configuration's real step, compiled for a topology, and everything the compiled program tells."""

from __future__ import annotations

import dataclasses
import re
import resource
import sys
import time
from pathlib import Path

import jax

from train.config import RunError, TrainConfig
from train.loop import training
from train.mesh import MeshConfig
from train.plan import hlo
from train.plan.collectives import Collective, collectives
from train.plan.cost import cost
from train.plan.memory import Memory, memory
from train.plan.predict import Prediction, predict
from train.plan.topology import Topology
from train.report import Report, report
from train.step import Training


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs of each chip.

    available      bytes of HBM that a program can have
    refused        the compiler's word, where it finds no room; then nothing below is known
    executed       operations of matrix products on one chip, loops as often as they run
    passes         the same, float32 products as often as the chip must pass them
    traffic        bytes to and from the HBM
    unknown_loops  loops counted as one round, for their program does not tell how many
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    global_batch: int
    row: int
    microbatches: int
    remat: str
    available: float
    compile_seconds: float
    compile_memory: float
    refused: str | None = None
    report: Report | None = None
    memory: Memory | None = None
    executed: float = 0.0
    passes: float = 0.0
    traffic: float = 0.0
    collectives: tuple[Collective, ...] = ()
    unknown_loops: tuple[str, ...] = ()
    prediction: Prediction | None = None

    @property
    def fits(self) -> bool:
        return self.memory is not None and fits(self.memory, self.available)


def fits(needed: Memory, available: float) -> bool:
    """Whether a chip has the room."""
    return needed.total <= available


def _resident() -> float:
    """Bytes that this process has had at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _no_room(error: Exception) -> str | None:
    """The line of a compiler's error that says how much is missing; None where the error is another."""
    text = str(error)
    return text.splitlines()[0][:300] if re.search("RESOURCE_EXHAUSTED|out of memory", text, re.IGNORECASE) else None


def compile_plan(config: TrainConfig, mesh: MeshConfig, topology: Topology, program: Path | None = None) -> Plan:
    """The plan of a configuration on one mesh of a topology; the compiled program's text is left in `program`."""
    made: Training = training(dataclasses.replace(config, mesh=mesh), topology.devices)
    begin = time.perf_counter()
    shape = {str(name): size for name, size in made.layout.mesh.shape.items()}
    refused, compiled = None, None
    try:
        compiled = made.lower(config.global_batch, config.row).compile()
    except jax.errors.JaxRuntimeError as error:
        refused = _no_room(error)
        if refused is None:
            raise RunError(f"the step does not compile for {topology.name}: {str(error)[:2000]}") from error
    took = time.perf_counter() - begin
    plan = Plan(
        topology=topology.name,
        chips=len(topology.devices),
        mesh=shape,
        global_batch=config.global_batch,
        row=config.row,
        microbatches=config.microbatches,
        remat=config.model.remat,
        available=topology.chip.memory,
        compile_seconds=took,
        compile_memory=_resident(),
        refused=refused,
    )
    if compiled is None:
        return plan
    text = compiled.as_text() or ""
    if program is not None:
        program.write_text(text)
    return _told(plan, compiled, text, made, topology)


def _told(plan: Plan, compiled: jax.stages.Compiled, text: str, made: Training, topology: Topology) -> Plan:
    """The plan with what the compiled program tells."""
    spent = cost(hlo.parse(text), topology.chip)
    talk = collectives(spent, made.layout.mesh, topology)
    costs = report(compiled, made.layout, plan.global_batch, plan.row, plan.compile_seconds)
    return dataclasses.replace(
        plan,
        report=costs,
        memory=memory(compiled, made.layout, plan.global_batch, plan.row),
        executed=spent.flops,
        passes=spent.passes,
        traffic=spent.traffic,
        collectives=tuple(talk),
        unknown_loops=tuple(spent.unknown),
        prediction=predict(spent, talk, topology, costs.analytic_flops),
    )
