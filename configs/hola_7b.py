"""HOLA at 7 billion parameters: rows of 2048 tokens, 4.2 million tokens to a step. `hola plan` says where it fits.

A recipe to plan with, not one of the paper's: shapes as of other 7B models, the paper's block, and its optimizer.
"""

import dataclasses

from configs import hola_340m
from hola_jax import ModelConfig
from train.mesh import MeshConfig

config = dataclasses.replace(
    hola_340m.config,
    run="runs/hola_7b",
    model=ModelConfig(dim=4096, layers=32, heads=16, remat="full"),  # K = V = 256
    mesh=MeshConfig(fsdp=16),
    steps=250_000,
    global_batch=2048,
    microbatches=4,
)
