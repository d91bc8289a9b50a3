"""Text with recall in it: facts told among source code and asked for, while the code itself is learned as well."""

import dataclasses

from configs.study.common import BASE, MODEL
from hola_jax import MemoryConfig
from train.data.config import Facts, LibraryText
from train.optimizer import OptimizerConfig
from train.study import Measure, Study

TEXT = LibraryText()
# An answer counts as 64 bytes of text, or in so few steps none is learned. The read begins as sharp as one over keys of 256
# numbers: a perfect match of normed keys of K numbers has a logit of sqrt(K), 4 here, and read_init multiplies it by 4.
STUDIED = dataclasses.replace(
    BASE,
    model=dataclasses.replace(
        MODEL,
        vocab_size=384,  # 256 bytes, 64 keys, 64 values
        mlp_dim=128,
        read_init=2.0,
        memory=MemoryConfig(window=8, block=16, chunk=16),
    ),
    data=Facts(most=4, noise=TEXT, answers_count=64),
    optimizer=OptimizerConfig(peak=6e-3, warmup=150),
    steps=2000,
    row=64,
    eval_every=250,
    eval_batches=16,
)
FOUR = Facts(most=4, fewest=4, noise=TEXT)
MEASURES = {
    "1 fact": Measure(Facts(most=1, noise=TEXT)),
    "4 facts": Measure(FOUR),
    "4 facts at 512": Measure(FOUR, length=512),
    "perplexity": Measure(TEXT, shows="perplexity", rows=1024),
    "in rows of 512": Measure(TEXT, shows="perplexity", rows=128, length=512),
}
study = Study(
    title="Text with recall in it (after the paper's Tables 2 and 4)",
    question="Where a model must recall and read on, what does the cache bring to each, and how sharp must its read begin?",
    base=STUDIED,
    rows={
        "no-cache": {"model.mixer": "gated_deltanet"},
        "hola": {},
        "hola-recency": {"model.memory.score": "recency"},
        "read-1": {"model.read_init": 1.0},
        "sandwich": {"model.norm": "sandwich"},
    },
    measures=MEASURES,
)
