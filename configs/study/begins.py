"""On text, how the cache begins: what keeps its first reads, which are noise, from costing more than they are worth."""

import dataclasses

from configs.study.text import study as text

study = dataclasses.replace(
    text,
    title="How the cache begins, on text",
    question="How open is the gate at first, how loud is the state beside it, how fast does the cache's own part learn?",
    rows={
        "hola": {},
        "gate-4": {"model.gate_init": -4},
        "state-scale-0.25": {"model.memory.state_scale": 0.25},
        "cache-rate-4": {"optimizer.cache_rate": 4},
    },
    seeds=(0,),
)
