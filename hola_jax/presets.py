"""The paper's models by name: a row of its Table 1 at one of its scales, such as "hola-340m".

A scale fixes everything but the mixer. Its name counts parameters without the embedding, of Gated DeltaNet with its gate.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hola_jax.config import MemoryConfig, ModelConfig, unknown_name

_SCALES: dict[str, dict[str, Any]] = {
    "340m": {"dim": 1024, "layers": 24, "heads": 4},
    "170m": {"dim": 1024, "layers": 12, "heads": 4},
    "46m": {"dim": 512, "layers": 12, "heads": 4, "max_length": 4096},
    # A notebook's: bytes as tokens, float32, blocks that a short text fills several times.
    "tiny": {
        "vocab_size": 256,
        "dim": 64,
        "layers": 2,
        "heads": 2,
        "dtype": "float32",
        "memory": MemoryConfig(window=16, block=32, chunk=16),
    },
}

_ROWS: dict[str, dict[str, Any]] = {
    "hola": {"mixer": "hola"},
    "hola-recency": {"mixer": "hola", "score": "recency"},
    "hola-residual": {"mixer": "hola", "score": "residual"},
    "hola-write": {"mixer": "hola", "score": "write"},
    "hola-random": {"mixer": "hola", "score": "random"},
    "hola-attention": {"mixer": "hola", "score": "attention"},  # what H2O keeps
    "hola-recall": {"mixer": "hola", "score": "recall"},  # what LoLA keeps
    "hola-learned": {"mixer": "hola", "score": "learned"},  # what LTE keeps
    "hola-same-key": {"mixer": "hola", "same_key": 0.95},  # for weights trained as "hola" (docs/scores.md)
    "hola-attnres": {"mixer": "hola", "residual": "attention"},
    "hola-block-attnres": {"mixer": "hola", "residual": "block_attention"},
    "gdn": {"mixer": "gated_deltanet"},
    "deltanet": {"mixer": "deltanet", "output_gate": False},  # as published: the gate came with Gated DeltaNet
    "kda": {"mixer": "kda"},
    "gla": {"mixer": "gla"},
    "gsa": {"mixer": "gsa"},
    "lola": {"mixer": "lola"},
    "transformer": {"mixer": "transformer", "head_width": 64},
}

PRESETS = tuple(f"{row}-{scale}" for scale in _SCALES for row in _ROWS)


def preset(name: str) -> ModelConfig:
    """The configuration called `name`; change it with `dataclasses.replace`."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    row, _, scale = name.rpartition("-")
    fields = _SCALES[scale] | _ROWS[row]
    if kept := {name: fields.pop(name) for name in ("score", "same_key") if name in fields}:
        fields["memory"] = dataclasses.replace(fields.get("memory", MemoryConfig()), **kept)
    if width := fields.pop("head_width", None):
        fields["heads"] = max(2, fields["dim"] // width)
    return ModelConfig(**fields)
