"""Checkpoints: the same parameters on any mesh, which of them stay, and what a changed configuration says."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.train.small import training
from tests.train.tiny_run import config as tiny_config
from train.checkpoint import Checkpoints, check_resumable, shapes
from train.config import CheckpointConfig, as_dict, defaults
from train.mesh import MeshConfig


def about(config, layout, **fields):
    return {
        "step": 3,
        "position": 24,
        "config": as_dict(config),
        "data": {"hash": "a"},
        "shapes": shapes(layout),
        **fields,
    }


@pytest.mark.slow
def test_a_restored_state_is_bit_for_bit_the_same_on_another_mesh(tmp_path):
    config = tiny_config(tmp_path)
    before, after = training(MeshConfig(fsdp=8)).layout, training(MeshConfig(data=2, fsdp=2, tensor=2)).layout
    state = before.init(7)
    saved = Checkpoints(tmp_path, CheckpointConfig(), print)
    saved.save(3, state, about(config, before))
    saved.close()
    restored, found = Checkpoints(tmp_path, CheckpointConfig(), print).restore(after, lambda about: None)
    assert found["position"] == 24
    jax.tree.map(np.testing.assert_array_equal, state, restored)
    as_laid_out = jax.tree.map(lambda x, to: x.sharding.is_equivalent_to(to, x.ndim), restored, after.state_shardings)
    assert all(jax.tree.leaves(as_laid_out))
    assert restored["params"]["blocks"]["mixer"]["query"]["kernel"].sharding.shard_shape((2, 32, 16)) == (2, 16, 8)


@pytest.mark.slow
def test_numbers_that_changed_on_the_disk_are_noticed(tmp_path):
    config, layout, said = tiny_config(tmp_path), training(MeshConfig()).layout, []
    saved = Checkpoints(tmp_path, CheckpointConfig(), print)
    for step in (3, 4):
        saved.save(step, layout.init(7), about(config, layout, step=step))
    saved.close()
    written = tmp_path / "checkpoints" / "4" / "about" / "metadata"
    values = json.loads(written.read_text())
    values["sums"]["params.embedding"] ^= 1
    written.write_text(json.dumps(values))
    _, found = Checkpoints(tmp_path, CheckpointConfig(), said.append).restore(layout, lambda about: None)
    assert found["step"] == 3
    assert "step 4 cannot be read (ValueError: the numbers of params.embedding are not those" in said[0]


@pytest.mark.slow
def test_the_latest_the_multiples_and_the_best_stay(tmp_path):
    layout = training(MeshConfig()).layout
    state, said = layout.init(0), []
    kept = Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_every=4, keep_best=1), said.append)
    for step, loss in enumerate([9.0, 3.0, 1.0, 3.0, 3.0, 3.0, 2.0, 3.0, 3.0, 3.0], start=1):
        kept.save(step, state, about(tiny_config(tmp_path), layout), loss)
    kept.finish()
    assert kept.steps() == [3, 4, 8, 9, 10] and not said
    kept.close()


def test_a_changed_configuration_is_named_and_another_model_refused():
    layout = training(MeshConfig()).layout
    config, said = tiny_config("run"), []
    old, usual = about(config, layout), defaults(config)
    check_resumable(old, old, usual, said.append)
    assert not said
    faster = dataclasses.replace(config, run="elsewhere", optimizer=dataclasses.replace(config.optimizer, peak=1.0))
    check_resumable(old, about(faster, layout), usual, said.append)
    assert said == ["changed since the checkpoint: optimizer.peak: 0.01 -> 1.0"]
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, dim=64))
    other = about(wider, training(MeshConfig(), fields={"dim": 64}).layout)
    with pytest.raises(ValueError, match=r"of another model: model\.dim: 16 -> 64"):
        check_resumable(old, other, usual, said.append)
    with pytest.raises(ValueError, match="with other data: hash: 'a' -> 'b'"):
        check_resumable(old, {**old, "data": {"hash": "b"}}, usual, said.append)


def test_a_setting_that_came_after_the_checkpoint_was_at_its_default():
    layout, config, said = training(MeshConfig()).layout, tiny_config("run"), []
    old, usual = about(config, layout), defaults(config)
    assert old["config"]["model"]["memory"].pop("fade", "none") is None and old["config"].pop("z_loss") == 0
    del old["config"]["cluster"], old["config"]["mesh"]
    check_resumable(old, about(config, layout), usual, said.append)
    assert not said
    check_resumable(old, about(dataclasses.replace(config, z_loss=0.5), layout), usual, said.append)
    assert said == ["changed since the checkpoint: z_loss: 0.0 -> 0.5"]


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path, CheckpointConfig(), print).restore(training().layout, print) is None
