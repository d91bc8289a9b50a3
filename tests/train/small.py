"""A run small enough for a test: a model, packed batches, and the trace of its losses on a mesh."""

import jax
import numpy as np

from tests.laws.mixers import small
from train.layout import Layout
from train.mesh import MeshConfig, make_mesh
from train.optimizer import OptimizerConfig
from train.step import Training

ROWS, TOKENS, STEPS = 8, 64, 10
RECIPE = OptimizerConfig(warmup=3)


def tiny(mixer="hola", **fields):
    return small(mixer, **{"vocab_size": 64, "max_length": TOKENS, **fields})


def batch(number, rows=ROWS, tokens=TOKENS, seed=0):
    """Two or three documents to a row, some tokens that do not count."""
    draw = np.random.default_rng((seed, number))
    ids = draw.integers(0, 64, (rows, tokens + 1)).astype(np.int32)
    cuts = np.sort(draw.integers(1, tokens, (rows, 2)), axis=1)
    segments = (1 + np.sum(np.arange(tokens + 1)[None, :, None] >= cuts[:, None], axis=-1)).astype(np.int32)
    mask = (segments[:, :-1] == segments[:, 1:]) & (draw.random((rows, tokens)) < 0.9)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": segments[:, :-1],
        "mask": mask.astype(np.uint8),
    }


def training(mesh=None, mixer="hola", devices=None, *, fields=None, **options):
    config = MeshConfig() if mesh is None else mesh
    layout = Layout(tiny(mixer, **(fields or {})), make_mesh(config, devices))
    return Training(layout, **{"optimizer": RECIPE, "steps": STEPS, **options})


def one_device(mixer="hola", **options):
    return training(MeshConfig(), mixer, jax.devices()[:1], **options)


def trace(train, compiled, steps=STEPS, state=None):
    """(metrics of each step, state after the last)."""
    state = train.layout.init(0) if state is None else state
    metrics = []
    for number in range(steps):
        state, found = compiled(state, jax.device_put(batch(number), train.layout.batch_sharding))
        metrics.append({name: float(value) for name, value in found.items()})
    return metrics, state
