"""Beyond the paper: other choices and other reads at the same memory of W + C + 1 entries a head, on planted facts."""

import dataclasses

from configs.study.common import BASE, MODEL
from hola_jax import MemoryConfig
from train.data.config import Facts
from train.optimizer import OptimizerConfig
from train.study import Measure, Study

# As small and short as shows a difference: four facts among noise and a read that begins sharp (configs/study/mixture.py).
WINDOW, HEADS = 8, MODEL.heads
STUDIED = dataclasses.replace(
    BASE,
    model=dataclasses.replace(MODEL, read_init=2.0, memory=MemoryConfig(window=WINDOW, block=16, chunk=16)),
    data=Facts(most=4),
    optimizer=OptimizerConfig(peak=6e-3, warmup=100),
    steps=1500,
    row=64,
)
FOUR = Facts(most=4, fewest=4)
study = Study(
    title="Beyond the paper, at the same memory",
    question="Does age, reading, a key that is told again, a budget of all heads, the score in the read, or another share "
    "of W and C make a better cache?",
    base=STUDIED,
    rows={
        "hola": {},
        "fade": {"model.memory.fade": 256.0},
        "reads-stay": {"model.memory.read_credit": 1.0},
        "reads-go": {"model.memory.read_credit": -1.0},
        "same-key": {"model.memory.same_key": 0.9},
        "same-key-0.95": {"model.memory.same_key": 0.95},
        "budget": {"model.memory.window": 2 * WINDOW, "model.memory.budget": HEADS * WINDOW},
        "power": {"model.memory.read_power": True},
        "w16-c8": {"model.memory.chunk": 8, "model.memory.block": 8, "model.memory.window": 16},
    },
    measures={
        "1 fact": Measure(Facts(most=1)),
        "4 facts": Measure(FOUR),
        "8 facts": Measure(Facts(most=8, fewest=8)),  # as many as W, and twice as many as in training
        "4 facts at 512": Measure(FOUR, length=512),
        "corrected": Measure(dataclasses.replace(FOUR, corrected=1.0)),  # never so in training
    },
)
