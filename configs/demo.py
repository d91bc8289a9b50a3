"""A small HOLA on the standard library's source, bytes as tokens: a minute on a CPU, and a template for your own."""

from hola_jax import MemoryConfig, ModelConfig
from train.config import CheckpointConfig, TrainConfig
from train.data.config import LibraryText
from train.optimizer import OptimizerConfig

config = TrainConfig(
    run="runs/demo",
    model=ModelConfig(
        vocab_size=256,
        dim=64,
        layers=2,
        heads=2,
        dtype="float32",
        memory=MemoryConfig(window=32, block=64, chunk=32),
    ),
    data=LibraryText(),
    optimizer=OptimizerConfig(peak=3e-3, warmup=20),
    checkpoint=CheckpointConfig(every=50),
    steps=200,
    global_batch=8,
    row=256,
    eval_every=100,
    vitals_every=100,
)
