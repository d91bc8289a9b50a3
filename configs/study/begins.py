"""On text, how the cache begins: what keeps its first reads, which are noise, from costing more than they are worth."""

import dataclasses

from configs.study.text import study as text

study = dataclasses.replace(
    text,
    title="How the cache begins, on text",
    question="How open is the gate, how loud the state beside it, how sharp the first read, how fast does the cache learn?",
    rows={
        "hola": {},
        "gate-4": {"model.gate_init": -4},
        "gate-0": {"model.gate_init": 0},
        "state-scale-0.25": {"model.memory.state_scale": 0.25},
        "soft-read": {"model.read_init": 0.5},
        "cache-rate-4": {"optimizer.cache_rate": 4},
    },
    seeds=(0,),
)
