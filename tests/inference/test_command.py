"""`hola generate` over the folder of a real, tiny run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hola_jax
from train import cli
from train.config import as_dict
from train.data.tokenizers import Bytes
from train.trained import trained

ROOT = Path(__file__).parents[2]
CODE = """
import sys
from hola_jax import MemoryConfig, ModelConfig
from train.config import CheckpointConfig, TrainConfig
from train.data.config import LibraryText
from train.loop import run
sizes = dict(vocab_size=256, dim=16, layers=1, heads=2, key_dim=4, value_dim=4, mlp_dim=16, dtype="float32")
model = ModelConfig(**sizes, mixer="gated_deltanet", memory=MemoryConfig(window=2, block=8, chunk=8))
config = TrainConfig(run=sys.argv[1], model=model, data=LibraryText(), steps=2, global_batch=4, row=16,
                     checkpoint=CheckpointConfig(every=1))
sys.exit(run(config))
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    command = [sys.executable, "-c", CODE, str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "XLA_FLAGS": flags})
    return str(folder)


def hola(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    cli.main(["generate", *arguments])
    return capsys.readouterr().out


def test_a_run_folder_is_a_model_and_its_tokenizer(run_folder: str) -> None:
    model, tokenizer = trained(run_folder)
    assert model.config.dim == 16 and isinstance(tokenizer, Bytes)
    first, _ = trained(run_folder, step=1)
    kernels = [np.asarray(m.embedding[...]) for m in (model, first)]
    assert not np.array_equal(*kernels)
    assert hola_jax.generate(model, "import ", tokenizer=tokenizer, max_tokens=2).prompt_tokens == 7


def test_prompts_are_continued(run_folder: str, capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    greedy = ("--max-tokens", "5", "--sampler", "greedy")
    one = hola(capsys, run_folder, "--prompt", "import os", *greedy)
    (tmp_path / "prompt.txt").write_text("import os")
    assert hola(capsys, run_folder, "--prompt-file", str(tmp_path / "prompt.txt"), *greedy) == one
    memory = str(tmp_path / "memory.safetensors")
    assert hola(capsys, run_folder, "--prompt", "import os", "--save-memory", memory, *greedy) == one
    assert hola(capsys, run_folder, "--memory", memory, *greedy) == one
    lines = hola(capsys, run_folder, "--memory", memory, "--prompt", ".", ".path", *greedy).splitlines()
    assert sorted(json.loads(line)["row"] for line in lines) == [0, 1]
    answers = iter(["first", "", "second"])

    def typed(_: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    assert hola(capsys, run_folder, "--interactive", *greedy).endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", ""), "the prompt is empty"),
        ((), "there is no prompt"),
        (("--prompt", "a", "--max-tokens", "0"), "max_tokens is 0"),
        (("--prompt", "a", "--sampler", "gredy"), "did you mean 'greedy'"),
        (("--prompt", "a", "--memory", "absent"), "there is no snapshot absent"),
        (("--prompt", "a", "--step", "7"), "no checkpoint of step 7; it has those of"),
        (("--prompt", "a", "--interactive"), "--interactive reads its prompts"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(run_folder: str, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["generate", run_folder, *arguments])
    assert words in str(exit.value) and "\n" not in str(exit.value)


def test_broken_text_and_folders_are_named(run_folder: str, tmp_path: Path) -> None:
    (tmp_path / "broken.txt").write_bytes(b"ab\xff")
    for arguments, words in (
        ((run_folder, "--prompt-file", str(tmp_path / "broken.txt")), "not UTF-8: invalid start byte at byte 2"),
        ((str(tmp_path), "--prompt", "a"), "is no run folder, it has no checkpoints"),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(["generate", *arguments])
        assert words in str(exit.value)


def test_a_damaged_checkpoint_is_an_error_and_stays(run_folder: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    newest = max((copy / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for path in newest.rglob("*"):
        if path.is_file() and path.stat().st_size > 200 and "state" in path.parts:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"the checkpoint of step 2 in .* (cannot be read|is damaged)"):
        trained(copy)
    assert newest.is_dir() and as_dict(trained(copy, step=1)[0].config)["dim"] == 16


def test_serving_binds_to_loopback(run_folder: str, tmp_path: Path, monkeypatch: Any) -> None:
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    from starlette.testclient import TestClient

    (tmp_path / "key").write_text("secret\n")
    found: dict[str, Any] = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: found.update(app=app, **options))
    cli.main(["serve", run_folder, "--api-key-file", str(tmp_path / "key"), "--slots", "1"])
    assert found["host"] == "127.0.0.1" and found["port"] == 8000
    with TestClient(found["app"]) as client:
        assert client.get("/v1/models").status_code == 401
        told = client.get("/v1/models", headers={"Authorization": "Bearer secret"}).json()
        assert told["data"][0]["id"] == "tiny"
        body = {"model": "tiny", "prompt": "import", "max_tokens": 2}
        answer = client.post("/v1/completions", json=body, headers={"Authorization": "Bearer secret"})
        assert answer.json()["usage"]["prompt_tokens"] == 6


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--port", "70000", "--port is 70000; it must be from 1 to 65535"),
        ("--slots", "0", "slots is 0; it must be an integer of at least 1"),
        ("--api-key-file", os.devnull, "is empty; it must hold the API key"),
        ("--chat-turn", "{role}", "it must hold {content}"),
    ],
)
def test_what_cannot_be_served_is_one_line(run_folder: str, option: str, value: str, words: str) -> None:
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    with pytest.raises(SystemExit) as exit:
        cli.main(["serve", run_folder, option, value])
    assert words in str(exit.value) and "\n" not in str(exit.value)


def test_without_the_extra_serving_says_what_to_install(run_folder: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match=r"hola serve needs uvicorn: pip install 'hola-jax\[serve\]'"):
        cli.main(["serve", run_folder])
