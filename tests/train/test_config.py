"""Configurations: what the command line changes, and what it is told when it cannot."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from tests.train.processes import ROOT
from tests.train.tiny_run import config as tiny_config
from train import cli
from train.config import as_dict, differences, flat, write
from train.data.config import LibraryText, Mixture, Records
from train.overrides import from_dict, load, override, pairs
from train.whole import write_whole
from train.writers import JsonLines, open_writers

CONFIG = tiny_config("run")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("optimizer.peak", "1e-3", 1e-3),
        ("steps", "1e3", 1000),
        ("steps", "2_000", 2000),
        ("model.memory.window", "3", 3),
        ("model.memory.score", "recency", "recency"),
        ("checkpoint.keep_every", "none", None),
        ("checkpoint.keep_every", "7", 7),
        ("cluster.join", "true", True),
        ("writers", "tensorboard,wandb", ("tensorboard", "wandb")),
        ("data.name", "other", "other"),
    ],
)
def test_an_override_changes_one_setting(name, text, value):
    new = override(CONFIG, name, text)
    assert flat({"x": as_dict(new)})["x." + name] == (list(value) if isinstance(value, tuple) else value)
    assert type(new) is type(CONFIG) and len(differences(as_dict(CONFIG), as_dict(new))) <= 1


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        (
            "optimizer.peek",
            "1",
            r"--optimizer.peek is no setting of this configuration; did you mean --optimizer.peak\?",
        ),
        ("window", "1", r"did you mean --model.memory.window\?"),
        ("steps.more", "1", "--steps.more is no setting"),
        ("optimizer", "1", "is a group of settings, OptimizerConfig; set one of them: --optimizer.peak"),
        ("steps", "1.5", "--steps is '1.5'; it must be an integer"),
        ("optimizer.peak", "big", "must be a number"),
        ("model.mixer", "holla", "did you mean 'hola'"),
        ("cluster.join", "1", "must be true or false"),
        ("steps", "0", "steps is 0; it must be at least 1"),
        ("writers", "csv", "it may name tensorboard and wandb"),
        ("model.memory.chunk", "3", "chunk=3 does not divide"),
    ],
)
def test_what_cannot_be_set_is_named(name, text, reason):
    with pytest.raises(ValueError, match=reason):
        override(CONFIG, name, text)


def test_values_stand_behind_an_equals_sign_or_after_it():
    assert pairs(["--a=1", "--b-c", "2"]) == [("a", "1"), ("b_c", "2")]
    with pytest.raises(ValueError, match="--a has no value"):
        pairs(["--a"])
    with pytest.raises(ValueError, match="'a=1' is no override"):
        pairs(["a=1"])


def test_a_file_without_a_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no configuration file"):
        load(str(tmp_path / "no.py"))
    (tmp_path / "empty.py").write_text("x = 1")
    with pytest.raises(ValueError, match="defines no `config"):
        load(str(tmp_path / "empty.py"))


def test_every_verb_says_in_a_line_what_it_does_and_how_it_is_called(capsys):
    for arguments, code, told in (["--help"], 0, "out"), ([], 2, "err"):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == code
        lines = getattr(capsys.readouterr(), told).splitlines()[2:]
        assert [line.split()[0] for line in lines] == list(cli.VERBS) and max(map(len, lines)) <= 110
    for name, verb in cli.VERBS.items():
        assert f": `hola {name}" in verb.__doc__.splitlines()[0]


@pytest.mark.parametrize("arguments", [["train", "--help"], ["train"]])
def test_help_is_there(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "hola train CONFIG" in capsys.readouterr().out


def test_a_wrong_setting_ends_the_command_in_one_line(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("from tests.train.tiny_run import config as make\nconfig = make('run')\n")
    with pytest.raises(SystemExit, match=r"hola: --stepz is no setting .* did you mean --steps"):
        cli.main(["train", str(tmp_path / "mine.py"), "--stepz=3"])
    cli.main(["train", str(tmp_path / "mine.py"), "--help"])
    assert "--optimizer.peak=0.01" in capsys.readouterr().out


def test_the_resolved_configuration_lies_beside_the_run(tmp_path):
    write(CONFIG, tmp_path, ["hola", "train", "x.py", "--steps=3"], {"jax": "1"})
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["command"] == "hola train x.py --steps=3" and found["config"] == as_dict(CONFIG)
    assert found["config"]["data"] == {"kind": "FakeSource", "name": "fake"}


def test_records_are_cut_at_the_step_resumed_from_and_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    lines = JsonLines(path, 2)
    lines.write({"step": 3, "loss": float("nan")})
    lines.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": null}\n'


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_writer_that_is_not_installed_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, {"tensorboard": "tensorboardX"}.get(name, name), None)
    with pytest.raises(ImportError, match="pip install"):
        open_writers((name,), tmp_path, {}, 0)


@pytest.mark.slow
def test_every_configuration_of_the_house_loads():
    for path in sorted((ROOT / "configs").glob("[a-z]*.py")):
        assert dataclasses.is_dataclass(load(str(path))), path


@pytest.mark.slow
def test_the_command_trains(tmp_path):
    small = ["--steps=3", "--row=64", "--global-batch=2", f"--run={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "train.cli", "train", "configs/demo.py", *small]
    # One device: to compile for eight takes three times as long.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags})
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2


@pytest.mark.parametrize("data", [LibraryText(), Mixture(((2.0, Records("a", check="full")), (1.0, LibraryText())))])
def test_a_run_folder_gives_its_configuration_again(tmp_path, data):
    config = dataclasses.replace(CONFIG, data=data, run=str(tmp_path), writers=("wandb",))
    write(config, tmp_path, ["hola"], {})
    assert load(str(tmp_path)) == config


def test_a_folder_without_a_run_or_of_another_version_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no run folder, it has no config\.json"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="TrainConfig has no setting stepz; was it written by another version"):
        from_dict(type(CONFIG), {**as_dict(CONFIG), "stepz": 1})


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "new" / "config.json"
    write_whole(path, "before")

    def half(self, text):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(27, "File too large")

    monkeypatch.setattr(type(path), "write_text", half)
    with pytest.raises(OSError, match="too large"):
        write_whole(path, "afterwards")
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("config.json", "before")]
