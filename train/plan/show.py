"""A plan in words and tables."""

from __future__ import annotations

import dataclasses

from train.plan.chips import GIB
from train.plan.compile import Plan
from train.plan.search import Candidate
from train.plan.topology import Topology

NAMES = {
    "parameters": "parameters",
    "moments": "optimizer moments",
    "state": "rest of the state",
    "batch": "batch",
    "temporaries": "activations and other temporaries",
    "output": "output",
    "code": "program",
    "padding": "padding to tiles",
}


def shape_name(mesh: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "one device"


def amount(size: float) -> str:
    """Bytes in a unit that suits them."""
    units = ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    return next((f"{size / unit:.2f} {name}" for unit, name in units if size >= unit), f"{size:.0f} B")


def verdict(plan: Plan) -> str:
    if plan.memory is None:
        return f"does not fit: {plan.refused}"
    if plan.fits:
        return f"fits: {amount(plan.available - plan.memory.total)} to spare"
    return f"does not fit: {amount(plan.memory.total - plan.available)} too much"


def lines(plan: Plan, topology: Topology) -> list[str]:
    """All that is known of a plan."""
    said = [
        f"{plan.topology}: {plan.chips} chips, mesh {shape_name(plan.mesh)}",
        f"{plan.global_batch} rows of {plan.row} tokens a step, in microbatches: {plan.microbatches}, remat {plan.remat}",
        f"compiled in {plan.compile_seconds:.0f} s with {amount(plan.compile_memory)} at most",
    ]
    if plan.memory is None or plan.report is None:
        return [*said, f"one chip: {verdict(plan)}", *remedy(plan)]
    by = f"{plan.report.implementation} ({plan.report.implementation_reason})"
    said += [f"{plan.report.parameters:,} parameters; the mixer's memory by {by}", "", "memory of one chip"]
    said += [f"  {NAMES[kind]:<34}{amount(size):>12}" for kind, size in dataclasses.asdict(plan.memory).items() if size]
    said += [f"  {'total':<34}{amount(plan.memory.total):>12}   {verdict(plan)}", *remedy(plan), ""]
    return said + operations(plan) + talk(plan) + prediction(plan, topology)


def remedy(plan: Plan) -> list[str]:
    """What to do where there is no room."""
    return (
        []
        if plan.fits
        else ["  more room: --microbatches, --model.remat=full, a larger --mesh.fsdp, a smaller --loss-chunk"]
    )


def operations(plan: Plan) -> list[str]:
    """Of the step and of one chip."""
    if plan.report is None:
        return []
    needed = plan.report.analytic_flops / plan.chips
    lost = [f"  rounds unknown, counted once: {', '.join(plan.unknown_loops)}"] if plan.unknown_loops else []
    return [
        "operations",
        f"  the model's (analytic)            {plan.report.analytic_flops:.3g} a step, {needed:.3g} a chip",
        f"  matrix products compiled          {plan.executed:.3g} a chip ({plan.executed / needed:.2f} of the model's), "
        f"{plan.passes:.3g} as the chip passes float32",
        f"  to and from the HBM               {amount(plan.traffic)} a chip",
        *lost,
        *(f"  not divided: {line}" for line in plan.report.whole_dimensions),
        "",
    ]


def talk(plan: Plan) -> list[str]:
    """The collectives."""
    if not plan.collectives:
        return ["collectives: none", ""]
    head = f"  {'kind':<20}{'axes':<26}{'count':>8}{'bytes a chip':>14}{'ms':>9}{'exposed ms':>12}"
    rows = [
        f"  {c.kind:<20}{c.axes:<26}{c.count:>8.0f}{amount(c.bytes):>14}{c.seconds * 1e3:>9.2f}{c.exposed * 1e3:>12.2f}"
        for c in plan.collectives
    ]
    return ["collectives", head, *rows, ""]


def prediction(plan: Plan, topology: Topology) -> list[str]:
    """The terms of the predicted step."""
    found, chip = plan.prediction, topology.chip
    if found is None:
        return []
    own = ", or the compiler's own estimate where longer" if chip.clock else ""
    rate = plan.global_batch * plan.row / found.step
    terms = [
        ("products", found.products, f"at {chip.matmul_efficiency:.0%} of {chip.flops:.3g} a second"),
        ("HBM", found.traffic, f"at {chip.memory_efficiency:.0%} of {chip.bandwidth:.3g} bytes a second"),
        ("roofline", found.roofline, "each kernel by its products or its bytes, one after the other"),
        ("kernels", found.kernels, f"the roofline's{own}"),
        ("launches", found.launches, f"{chip.launch * 1e6:g} us for each kernel"),
        ("collectives", found.exposed, "that nothing hides"),
        ("step", found.step, "kernels + launches + collectives"),
    ]
    warning = (
        ["  (the figures of `cpu` are of no machine: this only shows what a plan looks like)"]
        if chip.kind == "cpu"
        else []
    )
    return [
        "predicted, not measured",
        *(f"  {name:<14}{seconds * 1e3:>11.2f} ms   {how}" for name, seconds, how in terms),
        f"  {rate:,.0f} tokens/s, MFU {found.mfu:.1%} (analytic operations over {plan.chips} chips' peak)",
        *warning,
    ]


def estimates(found: list[Candidate], count: int, topology: Topology) -> list[str]:
    """The most promising of all candidates, by rough figures."""
    rough = [
        f"  {' x '.join(map(str, (c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.mesh.sequence))):<26}{amount(c.bytes):>12}"
        f"{c.seconds * 1e3:>12.1f}"
        for c in found[: max(count, 8)]
    ]
    head = f"  {'data x fsdp x tensor x seq.':<26}{'rough bytes':>12}{'rough ms':>12}"
    return [
        f"{len(found)} meshes divide model and batch; the first of them, {amount(topology.chip.memory)} a chip",
        head,
        *rough,
        "",
    ]


def table(plans: list[Plan]) -> list[str]:
    """The compiled meshes side by side."""
    head = f"  {'mesh':<38}{'bytes a chip':>13}{'step ms':>10}{'MFU':>8}   "
    rows = []
    for plan in plans:
        size = amount(plan.memory.total) if plan.memory else "-"
        step = f"{plan.prediction.step * 1e3:.1f}" if plan.prediction else "-"
        mfu = f"{plan.prediction.mfu:.1%}" if plan.prediction else "-"
        rows.append(f"  {shape_name(plan.mesh):<38}{size:>13}{step:>10}{mfu:>8}   {verdict(plan)}")
    return ["compiled", head, *rows]
