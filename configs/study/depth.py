"""Over depth: Attention Residuals beside the plain sum, and norms, on planted facts."""

import dataclasses

from configs.study.common import BASE, FACTS, MODEL
from train.study import Study

study = Study(
    title="Over depth: residual rules and norms",
    question="Do Attention Residuals help recall in a small HOLA, and what do a sandwich norm and a dynamic tanh change?",
    base=dataclasses.replace(BASE, model=dataclasses.replace(MODEL, layers=6), depth_every=500),
    rows={
        "plain": {},
        "attention": {"model.residual": "attention"},
        "blocks": {"model.residual": "block_attention", "model.residual_blocks": 3},
        "sandwich": {"model.norm": "sandwich"},
        "dynamic-tanh": {"model.norm": "dynamic_tanh"},
    },
    measures=FACTS,
)
