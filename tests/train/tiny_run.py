"""`python -m tests.train.tiny_run FOLDER [--name=value ...]`: `hola train` for a model that is tiny, on made-up rows."""

import os
import sys

FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
COUNT = os.environ.get("TINY_DEVICES", "1")


def config(folder):
    from hola_jax import MemoryConfig, ModelConfig
    from tests.train.fake_data import FakeSource
    from train.config import CheckpointConfig, TrainConfig
    from train.optimizer import OptimizerConfig

    return TrainConfig(
        run=str(folder),
        model=ModelConfig(
            vocab_size=32,
            dim=16,
            layers=1,
            heads=2,
            key_dim=4,
            value_dim=4,
            mlp_dim=16,
            dtype="float32",
            memory=MemoryConfig(window=2, block=8, chunk=8),
        ),
        data=FakeSource(),
        optimizer=OptimizerConfig(peak=1e-2, warmup=5),
        checkpoint=CheckpointConfig(every=10, keep=3),
        steps=200,
        global_batch=8,
        row=16,
        log_every=1,
    )


def main(arguments):
    os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_force_host_platform_device_count={COUNT}"
    from tests.train import fake_data
    from train import cli
    from train.loop import run
    from train.overrides import override, pairs

    # No process ends or goes on differently for its mixer, and this one compiles sooner than HOLA.
    chosen = override(config(arguments[0]), "model.mixer", "gated_deltanet")
    for name, value in pairs(arguments[1:]):
        chosen = override(chosen, name, value)
    cli.said_in_a_line(lambda: sys.exit(run(chosen, data=fake_data)))


if __name__ == "__main__":
    main(sys.argv[1:])
