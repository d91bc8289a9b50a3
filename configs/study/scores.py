"""What to keep: the paper's Table 4 and the rivals of docs/scores.md, on planted facts and with the paper's flat read."""

import dataclasses

from configs.study.common import BASE, FACTS, LENGTHS, MODEL
from train.study import Study

FLAT = dataclasses.replace(MODEL, memory=dataclasses.replace(MODEL.memory, read="unit_l2"))
# The read matters nothing to it; named as in reads.py, whose run it shares.
NO_CACHE = {"no-cache": {"model.mixer": "gated_deltanet", "model.memory.read": "rmsnorm"}}
SCORES = ("surprise", "residual", "write", "recency", "random", "attention", "recall", "learned")
study = Study(
    title="What to keep (after the paper's Table 4)",
    question="Which score chooses the tokens worth keeping, when all are read by unit vectors and a learned temperature?",
    base=dataclasses.replace(BASE, model=FLAT),
    rows={**NO_CACHE, **{score: {"model.memory.score": score} for score in SCORES}},
    measures=FACTS,
    across=LENGTHS,
)
