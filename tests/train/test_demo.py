"""The demo's parts: its text, its task, its bar, its loop, and what the command line says."""

import dataclasses
import io

import numpy as np
import pytest

from hola_jax import LanguageModel, preset
from train import cli
from train.demo import Demo
from train.fit import fit, rows_at_random, scores
from train.progress import Progress
from train.sources import Recall, library_text


def test_library_text_is_split_by_file(tmp_path):
    for number in range(40):
        (tmp_path / f"m{number}.py").write_bytes(bytes([number]) * 70)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_bytes(b"x" * 640)
    train, held_out = library_text(32, tmp_path)
    assert train.shape[1] == held_out.shape[1] == 32
    seen, unseen = set(np.unique(train)), set(np.unique(held_out))
    assert seen | unseen == set(range(40)) and not seen & unseen


def test_text_that_is_missing_or_too_short_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \.py files"):
        library_text(32, tmp_path)
    (tmp_path / "a.py").write_text("pass")
    with pytest.raises(ValueError, match="ask for shorter rows"):
        library_text(32, tmp_path)


@pytest.mark.parametrize("fewest", [2, 8])
def test_recall_asks_only_for_what_was_planted(fewest):
    tokens, mask = Recall().batch(np.random.default_rng(0), 20, fewest)
    assert tokens.shape == mask.shape == (20, 64)
    for row, asked in zip(tokens, mask, strict=True):
        told = int(np.argmax(asked)) // 2
        facts = dict(zip(row[: 2 * told : 2], row[1 : 2 * told : 2], strict=True))
        assert fewest <= told == len(facts) <= 8
        assert np.array_equal(np.flatnonzero(asked), np.arange(2 * told, 64, 2))
        assert all(facts[row[t]] == row[t + 1] for t in np.flatnonzero(asked))


def test_progress_shows_share_and_time_left():
    stream = io.StringIO()
    progress = Progress("work", 4, stream)
    progress.live = True
    assert list(progress.over(iter("abcd"))) == list("abcd")
    lines = stream.getvalue().split("\r\x1b[K")
    assert (
        "0/4" in lines[1] and lines[-1].startswith("work [########################] 4/4") and lines[-1].endswith("\n")
    )


def test_fit_learns_and_is_repeatable():
    rows = np.tile(np.arange(64, dtype=np.uint8) % 16, (4, 1))
    model = LanguageModel(dataclasses.replace(preset("hola-tiny"), dim=32))
    runs = [fit(model, rows_at_random(rows, 4, 0), 30, 1e-2, "fit") for _ in range(2)]
    batch = [next(rows_at_random(rows, 4, 1))]
    loss, right = scores(model, runs[0], batch)
    assert loss < 1.5 and right > 0.5
    assert scores(model, runs[1], batch) == (loss, right)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["demo", "--tokens", "0"], "--tokens is 0; it must be at least 2"),
        (["demo", "--text-stepz", "3"], "--text-steps"),
        (["dmeo"], "demo"),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_reason(arguments, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code
    said = capsys.readouterr()
    assert reason in said.out + said.err


@pytest.mark.slow
def test_the_demo_prints_both_models(capsys):
    Demo(text_steps=2, recall_steps=2, tokens=128).run()
    out = capsys.readouterr().out
    assert "HOLA" in out and "Gated DeltaNet" in out and out.count("/ byte") == 2 and "guessing gives" in out
