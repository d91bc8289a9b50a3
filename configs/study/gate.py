"""How the gate begins, on planted facts: the paper's -4 and wider."""

from configs.study.common import BASE, FACTS
from train.study import Study

study = Study(
    title="How far the gate is open at first",
    question="The paper begins with a gate of sigmoid(-4) = 0.018. What does a model learn from there, and what from wider?",
    base=BASE,
    rows={
        "no-cache": {"model.mixer": "gated_deltanet"},
        "gate-4": {"model.gate_init": -4},
        "gate-2": {"model.gate_init": -2},
        "gate-0": {},
    },
    measures=FACTS,
)
