"""Perplexity on the standard library's source, bytes as tokens, and what governs when HOLA overtakes its own backbone."""

from hola_jax import MemoryConfig, ModelConfig
from train.config import CheckpointConfig, TrainConfig
from train.data.config import LibraryText
from train.optimizer import OptimizerConfig
from train.study import Measure, Study

study = Study(
    title="Text, and how the cache begins (after the paper's Table 2)",
    question="Does the exact cache lower the perplexity of a text that repeats itself, and which beginning of its gate and "
    "of the sharp read lets it?",
    base=TrainConfig(
        run="",
        model=ModelConfig(
            vocab_size=256,
            dim=128,
            layers=3,
            heads=2,
            dtype="float32",
            memory=MemoryConfig(window=32, block=64, chunk=32),
        ),
        data=LibraryText(),
        optimizer=OptimizerConfig(peak=3e-3, warmup=50),
        checkpoint=CheckpointConfig(every=200, keep=1, keep_best=0),
        steps=1000,
        global_batch=8,
        row=512,
        log_every=50,
        eval_every=100,
    ),
    rows={
        "no-cache": {"model.mixer": "gated_deltanet"},
        "hola": {},
        "hola-recency": {"model.memory.score": "recency"},
        "hola-gate-2": {"model.gate_init": -2},
        "hola-gate-6": {"model.gate_init": -6},
        "hola-soft-read": {"model.read_init": 0.5},
        "hola-state-scale-1": {"model.memory.state_scale": 1.0},
    },
    measures={"perplexity of a byte": Measure(LibraryText(), shows="perplexity", rows=512)},
)
