"""Over depth: Attention Residuals beside the plain sum, and norms, in a HOLA and in a Transformer; on planted facts."""

import dataclasses

from configs.study.common import BASE, MODEL
from train.data.config import Facts
from train.optimizer import OptimizerConfig
from train.study import Measure, Study

# Short rows and a read that begins sharp (configs/study/mixture.py): what is learned within minutes by four layers.
TASK = Facts(most=4)
STUDIED = dataclasses.replace(
    BASE,
    model=dataclasses.replace(MODEL, layers=4, read_init=2.0, memory=dataclasses.replace(MODEL.memory, window=8)),
    data=TASK,
    optimizer=OptimizerConfig(peak=6e-3, warmup=150),
    steps=2000,
    row=64,
)
TRANSFORMER = {"model.mixer": "transformer"}
study = Study(
    title="Over depth: residual rules and norms",
    question="Do Attention Residuals help recall in a small HOLA, and what do a sandwich norm, a dynamic tanh and a norm of "
    "queries and keys alone change, there and in a Transformer?",
    base=STUDIED,
    rows={
        "plain": {},
        "attention": {"model.residual": "attention"},
        "blocks": {"model.residual": "block_attention", "model.residual_blocks": 2},
        "sandwich": {"model.norm": "sandwich"},
        "dynamic-tanh": {"model.norm": "dynamic_tanh"},
        "transformer": TRANSFORMER,
        "transformer-sandwich": {**TRANSFORMER, "model.norm": "sandwich"},
        "transformer-qk-sandwich": {**TRANSFORMER, "model.norm": "sandwich", "model.qk_norm": "input"},
        "transformer-tanh": {**TRANSFORMER, "model.norm": "dynamic_tanh"},
    },
    measures={
        "1 fact": Measure(Facts(most=1)),
        "4 facts": Measure(Facts(most=4, fewest=4)),
        "4 facts at 512": Measure(Facts(most=4, fewest=4), length=512),
        "spike, medians": Measure(TASK, shows="spike"),
        "sink": Measure(TASK, shows="sink"),
    },
)
