"""A model and its tokenizer from a folder: the right step and tokenizer, and what is said where either is not there."""

import dataclasses

import jax
import numpy as np
import pytest

from hola_jax import LanguageModel
from tests.train.tiny_run import config as tiny_config
from train import config as configuration
from train.checkpoint import Checkpoints, shapes
from train.config import CheckpointConfig
from train.data import loader, tokenizers
from train.data.config import Facts, LibraryText, Mixture, Records, TextFolder
from train.layout import Layout
from train.mesh import MeshConfig, make_mesh
from train.trained import model_of, tokenizer_of, trained
from train.weights import Saved, look


def saved_with(source, made=None):
    """A run's model as `look` finds it, with this source of data."""
    config = dataclasses.replace(tiny_config("run"), data=source)
    about = {"config": configuration.as_dict(config), "data": loader.identity(source) if made is None else made}
    return Saved("run", config.model, 1, about)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = dataclasses.replace(tiny_config(folder), data=LibraryText())
    layout = Layout(config.model, make_mesh(MeshConfig(), jax.devices()[:1]))
    checkpoints = Checkpoints(folder, CheckpointConfig(), print)
    for step in (1, 2):
        about = {"config": configuration.as_dict(config), "data": loader.identity(config.data)}
        checkpoints.save(step, layout.init(step), {**about, "shapes": shapes(layout)})
    checkpoints.close()
    return folder, config.model


def test_the_model_is_that_of_the_step_asked_for(run):
    folder, config = run
    for step, seed in ((1, 1), (2, 2), (None, 2)):
        found, tokenizer = trained(folder, step)
        np.testing.assert_array_equal(found.embedding[...], LanguageModel(config, seed=seed).embedding[...])
        assert tokenizer.name == "bytes"


def test_the_type_of_activations_can_be_another(run):
    saved = look(run[0])
    assert saved.config.dtype == "float32" and model_of(saved, "bfloat16").config.dtype == "bfloat16"
    assert model_of(saved, "bfloat16").embedding[...].dtype == "float32"


def test_another_tokenizer_than_the_runs_is_refused(run, tmp_path):
    (tmp_path / "other.json").write_bytes(tokenizers.train_bpe(iter(["some words"]), 260))
    with pytest.raises(ValueError, match=r"other\.json has the hash .* was made with bytes, .* give that one"):
        trained(run[0], tokenizer=str(tmp_path / "other.json"))


def test_a_source_tells_its_tokenizer(tmp_path):
    (tmp_path / "own.json").write_bytes(tokenizers.train_bpe(iter(["some words"]), 260))
    own = TextFolder("texts", tokenizer=str(tmp_path / "own.json"))
    assert tokenizer_of(saved_with(LibraryText())).name == "bytes"
    assert tokenizer_of(saved_with(own)).name == "own.json"
    assert tokenizer_of(saved_with(Facts(noise=own))).name == "own.json"
    assert tokenizer_of(saved_with(Mixture(((1.0, Facts()), (2.0, TextFolder("texts")))))).name == "bytes"


def test_numbers_without_text_have_no_tokenizer_but_take_one():
    saved = saved_with(Facts())
    with pytest.raises(ValueError, match="numbers without a text; say which tokenizer with --tokenizer"):
        tokenizer_of(saved)
    assert tokenizer_of(saved, "bytes").name == "bytes"


def test_data_that_are_gone_are_named():
    saved = saved_with(Records("nowhere"), {"tokenizer": "bytes", "hash": tokenizers.load("bytes").hash})
    with pytest.raises(FileNotFoundError, match="the run's data, nowhere, are not here"):
        tokenizer_of(saved)
    assert tokenizer_of(saved, "bytes").name == "bytes"


def test_a_tokenizer_beside_the_weights_is_found(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json; say which tokenizer"):
        tokenizer_of(Saved(tmp_path, run[1]))
    data = tokenizers.train_bpe(iter(["some words"]), 260)
    (tmp_path / "tokenizer.json").write_bytes(data)
    assert tokenizer_of(Saved(tmp_path, run[1])).hash == tokenizers.Json(data, "x").hash
    assert tokenizer_of(Saved(tmp_path, run[1]), "bytes").name == "bytes"
