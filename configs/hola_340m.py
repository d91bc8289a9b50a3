"""HOLA at 340M by the paper's recipe: rows of 2048 tokens, half a million tokens to a step, 15 billion in all.

`hola prepare` makes the data; `--data.path` says where it lies, `--mesh.fsdp` over how many devices parameters are divided.
"""

import dataclasses

from hola_jax import preset
from train.config import CheckpointConfig, TrainConfig
from train.data.config import Records

config = TrainConfig(
    run="runs/hola_340m",
    model=dataclasses.replace(preset("hola-340m"), remat="full"),
    data=Records(path="data/slimpajama"),
    checkpoint=CheckpointConfig(every=1000, keep_every=10_000),
    steps=28_610,
    global_batch=256,
    row=2048,
    eval_every=1000,
    vitals_every=1000,
)
