"""How long a step may take, term by term. A prediction: it is derived, not measured."""

from __future__ import annotations

import dataclasses

from train.plan.collectives import Collective
from train.plan.cost import Cost
from train.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of a step.

    products   matrix products alone, at the share of the peak that large ones reach
    traffic    all bytes to and from the HBM, at the share of its bandwidth that large transfers reach
    roofline   each kernel the longer of the two, one after the other
    kernels    the same, none shorter than the compiler's own estimate of it; never less than all traffic
    launches   starting them
    exposed    collectives that nothing hides
    step       kernels + launches + exposed
    mfu        analytic operations over what the chips could do meanwhile
    """

    products: float
    traffic: float
    roofline: float
    kernels: float
    launches: float
    exposed: float
    step: float
    mfu: float


def predict(cost: Cost, talk: list[Collective], topology: Topology, analytic_flops: float) -> Prediction:
    """Of a step whose operations, over all chips, are `analytic_flops`."""
    chip = topology.chip
    traffic = cost.traffic / (chip.bandwidth * chip.memory_efficiency)
    kernels = max(cost.seconds, traffic)
    launches = cost.kernels * chip.launch
    hidden = sum(each.seconds - each.exposed for each in talk)
    exposed = sum(each.exposed for each in talk) + max(0.0, hidden - kernels)
    step = kernels + launches + exposed
    return Prediction(
        products=cost.passes / (chip.flops * chip.matmul_efficiency),
        traffic=traffic,
        roofline=max(cost.roofline, traffic),
        kernels=kernels,
        launches=launches,
        exposed=exposed,
        step=step,
        mfu=analytic_flops / (step * chip.flops * len(topology.devices)),
    )
