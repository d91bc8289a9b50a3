"""Gated DeltaNet at 340M: `hola_340m` in everything but the mixer."""

import dataclasses

from configs import hola_340m
from hola_jax import preset

config = dataclasses.replace(
    hola_340m.config, run="runs/gdn_340m", model=dataclasses.replace(preset("gdn-340m"), remat="full")
)
