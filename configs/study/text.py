"""Perplexity on the standard library's source, bytes as tokens, and what of the cache's beginning matters."""

import dataclasses

from configs.study.common import BASE, MODEL
from hola_jax import MemoryConfig
from train.data.config import LibraryText
from train.study import Measure, Study

# A fixed state_scale of K^-1/2 hides the state behind the cache's answer, and a new cache answers with noise.
MEMORY = MemoryConfig(window=32, block=32, chunk=32, state_scale=1.0)
study = Study(
    title="Text, and how the cache begins (after the paper's Table 2)",
    question="Does the exact cache lower the perplexity of a text that repeats itself, and what of its beginning matters?",
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
        "gate-4": {"model.gate_init": -4},
        "gate-0": {"model.gate_init": 0},
        "state-scale-0.25": {"model.memory.state_scale": 0.25},
        "soft-read": {"model.read_init": 0.5},
        "cache-rate-4": {"optimizer.cache_rate": 4},
    },
    measures={
        "perplexity of a byte": Measure(LibraryText(), shows="perplexity", rows=512),
        "in rows of 2048": Measure(LibraryText(), shows="perplexity", rows=128, length=2048),
    },
)
