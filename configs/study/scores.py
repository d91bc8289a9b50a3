"""What to keep: the paper's Table 4, on planted facts and with its flat read."""

import dataclasses

from configs.study.common import BASE, FACTS, MODEL
from hola_jax import MemoryConfig
from train.study import Study

FLAT = dataclasses.replace(MODEL, memory=MemoryConfig(window=16, block=16, chunk=16, read="unit_l2"))
SCORES = ("surprise", "residual", "write", "recency", "random")
study = Study(
    title="What to keep (after the paper's Table 4)",
    question="Which score chooses the tokens worth keeping, when all are read by unit vectors and a learned temperature?",
    base=dataclasses.replace(BASE, model=FLAT),
    rows={"no-cache": {"model.mixer": "gated_deltanet"}, **{score: {"model.memory.score": score} for score in SCORES}},
    measures=FACTS,
)
