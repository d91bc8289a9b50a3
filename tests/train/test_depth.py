"""A rule over depth in training: on a mesh, through a checkpoint, and watched."""

import functools

import jax
import numpy as np
import pytest

from hola_jax import diagnostics
from tests.train.small import ROWS, TOKENS, batch, one_device, trace, training
from tests.train.tiny_run import config as tiny_config
from train import forward
from train.checkpoint import Checkpoints
from train.config import CheckpointConfig, as_dict
from train.mesh import MeshConfig

FIELDS = {"residual": "block_attention", "layers": 4, "residual_blocks": 2}  # layers in two groups
MESH = MeshConfig(data=1, fsdp=2, tensor=2, sequence=2)  # every way of cutting
TOLERANCE = 1e-5  # relative: float32 sums in another order


@functools.cache
def on_one_device():
    train = one_device("gla", fields=FIELDS)
    return train, *trace(train, train.lower(ROWS, TOKENS).compile(), steps=4)


def test_it_learns_and_a_checkpoint_brings_all_of_it_back(tmp_path):
    train, metrics, state = on_one_device()
    losses = [step["loss"] for step in metrics]
    assert np.isfinite(losses).all() and len(set(losses)) == 4
    assert np.abs(state["params"]["blocks"]["mlp_read"]["query"]).min(axis=1).max() > 0  # from zero
    saved = Checkpoints(tmp_path, CheckpointConfig(), print)
    saved.save(4, state, {"config": as_dict(tiny_config(tmp_path))})
    saved.close()
    restored, _ = Checkpoints(tmp_path, CheckpointConfig(), print).restore(train.layout, lambda about: None)
    jax.tree.map(np.testing.assert_array_equal, state, restored)


@pytest.mark.slow
def test_a_mesh_gives_the_losses_of_one_device():
    train = training(MESH, "gla", fields=FIELDS)
    got = [metrics["loss"] for metrics in trace(train, train.lower(ROWS, TOKENS).compile(), steps=4)[0]]
    np.testing.assert_allclose(got, [metrics["loss"] for metrics in on_one_device()[1]], rtol=TOLERANCE)


def test_the_signs_of_a_run_are_those_of_its_model():
    train, _, state = on_one_device()
    tokens = batch(0)["tokens"][:2]
    signs = forward.looker(train.layout, diagnostics.depth_signs)(state["params"], tokens)
    assert len(signs) == 2 * 2 * 4 and all(np.isfinite(x) and x > 0 for x in signs.values())
