"""What a compiled step costs, said before it runs and saved with the run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from hola_jax.config import flops_per_token, parameter_count
from train.layout import Layout


@dataclasses.dataclass(frozen=True)
class Report:
    """Bytes are of one device. The compiler counts the operations of one device, and those of a loop's body once; the
    analytic count is of all devices and is what MFU is measured by."""

    parameters: int
    implementation: str
    implementation_reason: str
    mesh: dict[str, int]
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    aliased_bytes: int
    compiler_flops: float | None
    analytic_flops: float
    compile_seconds: float
    whole_dimensions: list[str]

    @property
    def peak_bytes(self) -> int:
        """Of one device while the step runs; the outputs that are aliased lie in donated arguments."""
        return self.argument_bytes + self.output_bytes - self.aliased_bytes + self.temporary_bytes

    def lines(self) -> list[str]:
        """For the console."""
        shape = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1) or "one device"
        compiler = "unknown" if self.compiler_flops is None else f"{self.compiler_flops:.3g} (a loop's body once)"
        gib = 2**30
        return [
            f"mesh            {shape}",
            f"parameters      {self.parameters:,}",
            f"implementation  {self.implementation}: {self.implementation_reason}",
            f"memory          {self.peak_bytes / gib:.2f} GiB per device: {self.argument_bytes / gib:.2f} state and batch, "
            f"{self.temporary_bytes / gib:.2f} temporary",
            f"operations      {self.analytic_flops:.3g} per step; by the compiler and per device {compiler}",
            f"compiled in     {self.compile_seconds:.1f} s",
            *(f"not divided     {line}" for line in self.whole_dimensions),
        ]


def report(compiled: jax.stages.Compiled, layout: Layout, rows: int, tokens: int, compile_seconds: float) -> Report:
    """What the compiled step for batches [rows, tokens] costs."""
    memory: Any = compiled.memory_analysis()
    over_depth = layout.over_depth(tokens // layout.mesh.shape["sequence"])
    cost: Any = compiled.cost_analysis() or {}
    return Report(
        parameters=parameter_count(layout.model)["total"],
        implementation=layout.choice.name,
        implementation_reason="; ".join(filter(None, (layout.choice.why, over_depth))),
        mesh=dict(layout.mesh.shape),
        argument_bytes=getattr(memory, "argument_size_in_bytes", 0),
        output_bytes=getattr(memory, "output_size_in_bytes", 0),
        temporary_bytes=getattr(memory, "temp_size_in_bytes", 0),
        aliased_bytes=getattr(memory, "alias_size_in_bytes", 0),
        compiler_flops=cost.get("flops"),
        analytic_flops=3 * flops_per_token(layout.model, tokens) * rows * tokens,
        compile_seconds=compile_seconds,
        whole_dimensions=layout.undivided,
    )
