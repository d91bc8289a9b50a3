"""Perplexity on the standard library's source, bytes as tokens: the paper's Table 2 at the size of the studies."""

import dataclasses

from configs.study.common import BASE, MODEL
from hola_jax import MemoryConfig
from train.data.config import LibraryText
from train.study import Measure, Study

# A fixed state_scale of K^-1/2 hides the state behind the cache's answer, and a new cache answers with noise.
MEMORY = MemoryConfig(window=32, block=32, chunk=32, state_scale=1.0)
study = Study(
    title="Text (after the paper's Table 2)",
    question="Does the exact cache lower the perplexity of a text that repeats itself?",
    base=dataclasses.replace(
        BASE,
        model=dataclasses.replace(MODEL, vocab_size=256, mlp_dim=256, gate_init=-2.0, memory=MEMORY),
        data=LibraryText(),
        steps=3000,
        global_batch=2,
        row=512,
        eval_batches=32,
    ),
    rows={
        "no-cache": {"model.mixer": "gated_deltanet"},
        "hola": {},
        "hola-recency": {"model.memory.score": "recency"},
        "hola-read-2": {"model.read_init": 2.0},  # as sharp as over keys of 256 numbers: configs/study/mixture.py
        "attention": {"model.mixer": "transformer"},
    },
    measures={
        "perplexity of a byte": Measure(LibraryText(), shows="perplexity", rows=512),
        "in rows of 2048": Measure(LibraryText(), shows="perplexity", rows=128, length=2048),
    },
)
