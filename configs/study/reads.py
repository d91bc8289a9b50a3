"""How to read: the paper's Table 5, on planted facts; and recall by length, its Figure 1b."""

from configs.study.common import BASE, FACTS, LENGTHS
from train.study import Study

study = Study(
    title="How to read (after the paper's Table 5)",
    question="What does the exact cache add, and what does the sharp read, RMSNorm on queries and keys, add to it?",
    base=BASE,
    rows={
        "no-cache": {"model.mixer": "gated_deltanet"},
        "unit-l2": {"model.memory.read": "unit_l2"},
        "rmsnorm": {},
        "rmsnorm-recency": {"model.memory.score": "recency"},
        "attention": {"model.mixer": "transformer"},
    },
    measures=FACTS,
    across=LENGTHS,
)
