"""`hola eval` on the run folder of a tiny model: from a checkpoint to tables and JSON, and what it refuses."""

import json

import jax
import numpy as np
import pytest

from hola_jax import LanguageModel, functional
from hola_jax.evals import perplexity
from tests.laws.mixers import small
from train import cli, config
from train.checkpoint import Checkpoints, shapes
from train.config import CheckpointConfig, TrainConfig
from train.data import loader, tokenizers
from train.data.config import TextFolder
from train.evaluate import prefix_of
from train.layout import Layout
from train.mesh import MeshConfig, make_mesh

TEXT = " = Title = \n \n " + "A few words , and then some more of them . \n " * 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    model = small("hola", vocab_size=256, layers=1)
    chosen = TrainConfig(run=str(folder), model=model, data=TextFolder("texts"), steps=2, global_batch=1, row=32)
    config.write(chosen, folder, ["hola", "train"], {})
    layout = Layout(model, make_mesh(MeshConfig(), jax.devices()[:1]))
    checkpoints = Checkpoints(folder, CheckpointConfig(), print)
    for step in (1, 2):
        about = {"config": config.as_dict(chosen), "data": loader.identity(chosen.data), "shapes": shapes(layout)}
        checkpoints.save(step, layout.init(step), about)
    assert checkpoints.finish()
    checkpoints.close()
    (folder.parent / "wiki.raw").write_text(TEXT)
    return folder


def evaluate(run, *arguments):
    cli.main(["eval", str(run), "--cache", str(run.parent / "cache"), *arguments])


def test_a_run_is_measured(run, capsys):
    file = run.parent / "wiki.raw"
    evaluate(run, "--samples", "2", "--batch-tokens", "1024", "--tasks", "passkey@480,512", f"wikitext={file}")
    told = capsys.readouterr()
    written = json.loads((run / "evals" / "step_2.json").read_text())
    assert written["step"] == 2 and written["tokenizer"] == "bytes"
    assert [(each["task"], each["length"]) for each in written["results"]] == [
        ("passkey", 480),
        ("passkey", 512),
        ("wikitext", None),
    ]
    assert "passkey" in told.out and "512" in told.out and "2/2" in told.err
    model = LanguageModel(small("hola", vocab_size=256, layers=1), seed=2)
    rows = perplexity.windows(np.frombuffer(perplexity.detokenised(TEXT).encode(), np.uint8), 255, 32)
    total = 0.0
    forward, params = functional(model)
    forward = jax.jit(forward)
    for row, count in zip(rows.rows, rows.counted, strict=True):
        logprob = jax.nn.log_softmax(forward(params, row[None, :-1])[0][0])[np.arange(len(row) - 1), row[1:]]
        total += float(logprob[-count:].sum())
    expected = np.exp(-total / sum(rows.counted))
    assert written["results"][2]["token_perplexity"] == pytest.approx(expected, rel=1e-4)


def test_a_hugging_face_folder_is_measured_as_the_run_it_came_from(run, capsys, tmp_path):
    file = run.parent / "wiki.raw"
    cli.main(["convert", str(run), str(tmp_path / "folder")])
    with pytest.raises(SystemExit, match=r"folder has no tokenizer\.json; say which tokenizer with --tokenizer"):
        evaluate(tmp_path / "folder", "--tasks", f"wikitext={file}")
    evaluate(tmp_path / "folder", "--tasks", f"wikitext={file}", "--tokenizer", "bytes", "--window", "32")
    evaluate(run, "--tasks", f"wikitext={file}", "--output", str(tmp_path / "run.json"))
    found, wanted = (
        json.loads(path.read_text()) for path in (tmp_path / "folder" / "evals" / "results.json", tmp_path / "run.json")
    )
    assert found["step"] is None and wanted["step"] == 2
    assert found["results"][0]["token_perplexity"] == wanted["results"][0]["token_perplexity"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tasks", "passkie@2k"], "there is no task 'passkie'; did you mean 'passkey'"),
        (["--tasks", "wikitext=none.raw"], "there is no file none.raw, named as wikitext"),
        (["--tasks", "passkey", "--step", "7"], "has no checkpoint of step 7; it has those of 1, 2"),
        (["--tasks", "passkey", "--tokenizer", "sentences"], "there is no tokenizer 'sentences'"),
        (["--tasks"], "no task is named"),
    ],
)
def test_it_refuses_before_it_loads_a_model(run, arguments, told, monkeypatch):
    monkeypatch.setattr("train.trained.model_of", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as ended:
        evaluate(run, *arguments)
    assert told in str(ended.value)


def test_a_folder_that_is_not_there_is_named_with_the_nearest(run):
    with pytest.raises(SystemExit, match=r"there is no folder .*tinny; did you mean .*tiny\?"):
        cli.main(["eval", str(run.parent / "tinny"), "--tasks", "passkey"])


def test_bytes_begin_with_their_end_of_a_document():
    assert prefix_of(tokenizers.load("bytes")) == 255


def test_mistral_texts_begin_with_its_first_token():
    pytest.importorskip("mistral_common", reason="mistral-common is not installed")
    assert prefix_of(tokenizers.load("mistral-v1")) == 1
