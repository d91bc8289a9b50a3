"""`hola convert`: checkpoints of any mesh to Hugging Face folders, and such folders to runs that go on training."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from hola_jax import LanguageModel, functional, weights
from hola_jax.losses import next_token_loss
from tests.train import fake_data
from tests.train.small import training
from tests.train.tiny_run import config as tiny_config
from train import cli
from train.checkpoint import Checkpoints, shapes
from train.config import CheckpointConfig, as_dict
from train.feed import inputs
from train.loop import run
from train.mesh import MeshConfig
from train.overrides import load as load_recipe
from train.weights import load, look, start_run


def saved(folder, mesh, mixer="hola", steps=(3,)):
    """A run's folder as that mesh leaves it; its last parameters."""
    layout = training(mesh, mixer).layout
    config = dataclasses.replace(tiny_config(folder), model=layout.model)
    checkpoints = Checkpoints(folder, CheckpointConfig(), print)
    for step in steps:
        state = layout.init(step)
        about = {"config": as_dict(config), "data": {}, "shapes": shapes(layout)}
        checkpoints.save(step, state, about)
    checkpoints.close()
    return layout.model, jax.device_get(state["params"])


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code not in (0, None)
    return str(stop.value.code)


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_becomes_a_folder_with_the_same_numbers(tmp_path, capsys):
    model, params = saved(tmp_path / "run", MeshConfig(data=2, fsdp=2, tensor=2), steps=(3, 4))
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "out")])
    assert "hola: " in capsys.readouterr().out
    found, again = weights.load(tmp_path / "out")
    assert found.memory == model.memory
    jax.tree.map(np.testing.assert_array_equal, params, again)
    older = load(tmp_path / "run", step=3, dtype="bfloat16")[1]
    assert older["embedding"].dtype == "bfloat16" and older["blocks"]["mixer"]["decay"]["A_log"].dtype == "float32"
    assert not np.array_equal(older["embedding"].astype(np.float32), params["embedding"])
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before  # reading leaves no trace
    cli.main(["convert", "--list-keys", str(tmp_path / "out")])
    assert "model.layers.{0-1}.attn.cache_gate  F32[2]" in capsys.readouterr().out
    assert "no checkpoint of step 9; it has those of 3, 4" in said(
        capsys, "convert", str(tmp_path / "run"), str(tmp_path / "b"), "--step", "9"
    )


@pytest.mark.slow
def test_numbers_that_changed_on_the_disk_are_noticed(tmp_path):
    saved(tmp_path, MeshConfig(fsdp=8))
    written = tmp_path / "checkpoints" / "3" / "about" / "metadata"
    values = json.loads(written.read_text())
    values["sums"]["params.embedding"] ^= 1
    written.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"step 3 in .* is damaged: the numbers of params\.embedding are not those"):
        load(tmp_path)


@pytest.mark.slow
def test_a_folder_becomes_a_run_that_trains_on_from_its_numbers(tmp_path):
    config = dataclasses.replace(tiny_config(tmp_path / "run"), steps=3, log_every=1)
    params = functional(LanguageModel(config.model, seed=5))[1]
    weights.save(tmp_path / "folder", config.model, params)
    model, read = weights.load(tmp_path / "folder")
    start_run(dataclasses.replace(config, model=model), read, fake_data)
    jax.tree.map(np.testing.assert_array_equal, params, load(tmp_path / "run")[1])
    assert run(dataclasses.replace(config, model=model), fake_data) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    rows = fake_data.open_source(config.data, split="train", vocab_size=32, row=16, seed=config.seed)
    first = inputs(next(fake_data.batches(rows, position=0, global_batch=8)))
    logits, _ = LanguageModel(config.model, seed=5)(first["tokens"], first["segment_ids"])
    expected = next_token_loss(logits, first["targets"], first["mask"])
    np.testing.assert_allclose(records[0]["loss"], expected, rtol=1e-5)
    trained = load(tmp_path / "run")[1]
    assert not np.array_equal(trained["embedding"], params["embedding"])


def test_the_command_line_makes_a_run_of_a_folder(tmp_path, capsys):
    model = dataclasses.replace(tiny_config(tmp_path).model, vocab_size=256, mixer="gated_deltanet")
    weights.save(tmp_path / "folder", model, functional(LanguageModel(model))[1])
    names = [str(tmp_path / "folder"), str(tmp_path / "run")]
    cli.main(["convert", *names, "--recipe", "configs/demo.py", "--settings", "steps=7", "model.remat=full"])
    recipe = load_recipe(str(tmp_path / "run"))
    assert (recipe.steps, recipe.model.remat, recipe.model.mixer) == (7, "full", "gated_deltanet")
    assert recipe.model.dim == model.dim and look(tmp_path / "run").step == 0
    assert "is there already" in said(capsys, "convert", *names, "--recipe", "configs/demo.py")
    assert "goes on with it" in said(capsys, "convert", names[1], names[0] + "2", "--recipe", "configs/demo.py")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["FROM"], "takes FROM and OUT; 1 names were given"),
        (["FROM", "OUT", "--settings", "steps=3"], "--settings changes a --recipe"),
        (["/nowhere", "OUT"], "there is no folder /nowhere"),
        (["configs", "OUT", "--step", "3"], "no run's folder"),
        (["--list-keys", "/nowhere"], "there is no file or folder /nowhere"),
        (["--list-keys", "FROM", "OUT"], "stands alone"),
        (["FROM", "OUT", "--dtype", "bfloat16", "--recipe", "configs/demo.py"], "a run's parameters are float32"),
    ],
)
def test_wrong_calls_are_refused_in_a_line(arguments, words, capsys):
    assert words in said(capsys, "convert", *arguments)


@pytest.mark.slow
def test_a_mixer_without_a_table_is_refused_by_name(tmp_path, capsys):
    saved(tmp_path / "run", MeshConfig(), "kda")
    assert "'kda' has no table" in said(capsys, "convert", str(tmp_path / "run"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
