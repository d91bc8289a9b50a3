"""Flax modules that declare parameters and call the memories; a mixer is one row of `MIXERS`.

Every mixer has one call for training, prefill and decoding, `(x, segment_ids, state) -> (y, state)`, where `state=None`
starts empty, and `init_state(config, batch)` for the state of an empty prefix.
"""

from __future__ import annotations

from typing import Any

from hola_jax.layers.attention import Attention
from hola_jax.layers.gated_delta_net import DeltaNet, GatedDeltaNet
from hola_jax.layers.gla import GLA
from hola_jax.layers.gsa import GSA
from hola_jax.layers.hola import HOLA
from hola_jax.layers.kda import KDA
from hola_jax.layers.lola import LoLA

__all__ = ["GLA", "GSA", "HOLA", "KDA", "MIXERS", "Attention", "DeltaNet", "GatedDeltaNet", "LoLA"]

MIXERS: dict[str, Any] = {
    "hola": HOLA,
    "gated_deltanet": GatedDeltaNet,
    "deltanet": DeltaNet,
    "kda": KDA,
    "gla": GLA,
    "gsa": GSA,
    "lola": LoLA,
    "transformer": Attention,
}
"""The module of each name that `ModelConfig.mixer` may have."""
