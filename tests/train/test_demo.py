"""The demo's parts: its recipe, its vocabulary, what it measures, what it says, its bar; and all of it with few steps."""

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hola_jax import LanguageModel, MemoryConfig
from hola_jax.diagnostics.repetition import Recall
from tests.diagnostics import browser
from tests.laws.mixers import small
from tests.train.processes import ROOT
from tests.train.tiny_run import FLAGS
from train import cli, compare, demo, findings, planted
from train.compare import Files, Measured, measure
from train.config import RunError, as_dict, differences
from train.data import tokenizers
from train.data.tokenizers import Bytes
from train.demo import FULL, QUICK, ROWS, Demo, Recipes, run_of, tokenizer_file, with_tokenizer
from train.overrides import load
from train.progress import Progress
from train.weights import Saved


def test_progress_shows_share_and_time_left():
    stream = io.StringIO()
    progress = Progress("work", 4, stream)
    progress.live = True
    assert list(progress.over(iter("abcd"))) == list("abcd")
    lines = stream.getvalue().split("\r\x1b[K")
    assert (
        "0/4" in lines[1] and lines[-1].startswith("work [########################] 4/4") and lines[-1].endswith("\n")
    )


@pytest.mark.parametrize("kind", Recipes._fields)
def test_the_three_runs_differ_in_their_memory_alone(kind):
    runs = {name: as_dict(run_of(getattr(FULL, kind), kind, name)) for name in ROWS}
    changed = {name: differences(runs["hola"], values) for name, values in runs.items()}
    assert [line.partition(":")[0] for line in changed["gdn"]] == ["model.mixer", "run"]
    assert [line.partition(":")[0] for line in changed["recency"]] == ["model.memory.score", "run"]
    assert runs["hola"]["model"]["mixer"] == "hola" and runs["hola"]["model"]["memory"]["score"] == "surprise"


def test_settings_reach_all_runs():
    text, facts = Demo(settings=("model.memory.state_scale=0.5", "steps=7"), folder="here").recipes()
    assert (text.model.memory.state_scale, text.steps, text.run) == (0.5, 7, "here")
    assert facts == dataclasses.replace(FULL.facts, run="here") and text.row == FULL.text.row
    assert Demo(quick=True, settings=("model.vocab_size=300",)).recipes().text.model.vocab_size == 300
    assert Demo(facts=("steps=9",)).recipes() == Recipes(FULL.text, dataclasses.replace(FULL.facts, steps=9))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["demo", "--longest", "3"], "--longest is 3; it must be at least 8"),
        (["demo", "--settings", "model.mixer=gla"], "model.mixer is not the demo's to set"),
        (
            ["demo", "--settings", "model.memory.same_key=0.9"],
            "what is kept, and that cannot be told: same_key",
        ),
        (["demo", "--settings", "run=x"], "run is not the demo's to set; --folder says where"),
        (["demo", "--settings", "stepz=3"], "did you mean --steps?"),
        (["demo", "--quick", "--settings", "steps=3"], "--quick trains nothing on text"),
        (["demo", "--jobs", "0"], "--jobs is 0; it must be at least 1"),
        (["demo", "--facts", "data.most=3"], "data.most is not the demo's to set"),
        (["demo", "--facts", "model.vocab_size=3"], "model.vocab_size is not the demo's to set"),
        (["demo", "--show", "pyproject.txt"], "pyproject.txt"),
        (["demo", "--show", os.devnull], "has fewer than 8 characters"),
        (["demo", "--qwick"], "--quick"),
        (["dmeo"], "demo"),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_reason(arguments, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code
    said = capsys.readouterr()
    assert reason in said.out + said.err + str(stop.value.code)


def test_the_vocabulary_is_learnt_once(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "library_texts", lambda source, split: {"a.py": "import os\nimport sys\n" * 9})
    path = tokenizer_file(tmp_path / "new", 262)
    assert tokenizers.load(path).vocab_size == 262
    monkeypatch.setattr(demo, "library_texts", None)
    assert tokenizer_file(tmp_path / "new", 262) == path
    with pytest.raises(ValueError, match=r"has 262 tokens, and the model is to have 300; give another --folder"):
        tokenizer_file(tmp_path / "new", 300)


def test_a_run_that_is_done_is_left_and_one_of_other_settings_refused(tmp_path, monkeypatch, capsys):
    recipe = dataclasses.replace(QUICK.text, run=str(tmp_path))
    config, about = run_of(recipe, "text", "hola"), {}

    def saved(step, **changed):
        about["config"] = json.loads(json.dumps(as_dict(dataclasses.replace(config, **changed))))
        monkeypatch.setattr(demo, "look", lambda folder: Saved(folder, config.model, step, about))

    assert not demo.is_trained(config)  # there is no such folder
    checkpoints = tmp_path / "text" / "hola" / "checkpoints"
    checkpoints.mkdir(parents=True)
    assert not demo.is_trained(config)  # it was stopped before its first checkpoint
    saved(config.steps // 2, run="where it was moved from")
    assert not demo.is_trained(config)
    saved(config.steps)
    assert demo.is_trained(config) and f"has its {config.steps} steps already" in capsys.readouterr().out
    saved(config.steps, seed=1)
    with pytest.raises(ValueError, match=r"was begun with other settings: seed: 1 -> 0\. Give another --folder"):
        demo.is_trained(config)


def test_each_run_is_a_process_on_its_share_of_the_cores(tmp_path, monkeypatch):
    made = {}

    class Workers:
        def __init__(self, at_a_time, say, watch, environment):
            made.update(at_a_time=at_a_time, watch=watch, **environment)

        def run(self, jobs):
            made["jobs"] = jobs
            return made.get("failed", [])

    monkeypatch.setattr(demo, "Workers", Workers)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    configs = [run_of(dataclasses.replace(QUICK.facts, run=str(tmp_path)), "facts", name) for name in ROWS]
    demo.train_all(configs, "cpu", None)
    assert (made["at_a_time"], made["JAX_PLATFORMS"], made["NPROC"]) == (3, "cpu", "2")
    assert [job.module for job in made["jobs"]] == [("train.cli", "train", config.run) for config in configs]
    assert [load(config.run) for config in configs] == configs  # what `hola train FOLDER` finds there
    demo.train_all(configs, "cuda", None)
    assert (made["at_a_time"], made["JAX_PLATFORMS"]) == (1, "cuda")
    made["failed"] = ["facts hola ended with 1: killed"]
    with pytest.raises(RunError, match=r"facts hola ended with 1: killed\. The same command goes on"):
        demo.train_all(configs, "cpu", 2)


def test_the_bar_tells_how_far_all_runs_are(tmp_path, capsys):
    config = dataclasses.replace(QUICK.facts, run=str(tmp_path), steps=100, global_batch=10, row=100)
    configs = [run_of(config, "facts", name) for name in ("gdn", "recency", "hola")]
    bar = demo.Bar(configs)
    for run, lines in zip(
        configs[:2], ('{"step": 50, "loss": 2.5}\n{"step": 60, "held_out_loss": 2.0}', '{"st'), strict=True
    ):
        Path(run.run).mkdir(parents=True)
        (Path(run.run) / "metrics.jsonl").write_text(lines)
    bar.show()
    said = capsys.readouterr().err
    assert said.startswith("thousand tokens [####....") and " 60/300 " in said and "facts gdn 60/100 loss nan" in said
    assert "recency" not in said and demo.Bar(configs).progress.first == 60


def texts(count=9, longest=700):
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 31, int(size)).astype(np.int32) for size in draw.integers(5, longest, count)]
    distances = [np.where(np.arange(len(row)) % 5 == 4, 1 + np.arange(len(row)) % 60, 0) for row in rows]
    return Files([str(n) for n in range(count)], rows, distances, [10, 40, 80], 1000, Bytes(), np.zeros(1, np.int64))


@pytest.fixture(scope="module")
def model():
    return LanguageModel(small("hola", memory=MemoryConfig(window=4, block=16, chunk=8)))


def test_what_is_measured_is_the_models_loss_on_every_token(model, monkeypatch):
    monkeypatch.setattr(compare, "PIECE", 64)
    few = texts(3, 100)
    found = measure(model, few, "model")
    for number, row in enumerate(few.rows):
        padded = np.pad(row, (0, 100 - len(row)))[None]
        logits = np.asarray(model(padded)[0][0, : len(row) - 1], np.float64)
        log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats = -log[np.arange(len(row) - 1), row[1:]]
        assert found.tokens[number] == len(nats) and found.nats[number] == pytest.approx(nats.sum(), rel=1e-5)
        far = few.distances[number][1:]
        within = (far > 10) & (far <= 40)
        assert found.recall.nats[number, 1] == pytest.approx(nats[within].sum(), rel=1e-5)
        assert found.recall.right[number, 1] == np.sum((logits.argmax(-1) == row[1:])[within])
        assert found.recall.asked[number].sum() == np.count_nonzero(far)


def test_the_page_shows_the_text_that_is_given_or_where_most_is_repeated(model, tmp_path):
    few = texts()
    few.distances[4][:] = 60  # farther than the block and the cache reach
    found = demo.some_file(model, "text", few, None)
    assert "guess the next token" in found.about
    assert found.name == "4" and len(found.tokens) == len(found.text) == len(found.distances) <= 1024
    file = tmp_path / "own.py"
    file.write_text("abcdefgh--abcdefgh" * 60)
    found = demo.some_file(model, "facts", few, str(file))
    assert found.name == "own.py" and "".join(found.text) == file.read_text()[:1024]
    assert found.distances[:15].tolist() == [0] * 13 + [10, 10]


@pytest.fixture(scope="module")
def facts():
    return planted.planted(with_tokenizer(QUICK, "bytes").facts, 256, 3)


def test_what_counts_among_facts_are_the_answers_by_how_long_ago_they_were_told(facts):
    most = QUICK.facts.data.most
    assert facts.ranges[0] == "1-16" and facts.edges[-1] == 256
    for row, distances in zip(facts.rows, facts.distances, strict=True):
        answers = np.flatnonzero(distances)
        assert (
            len(answers) == most and answers.min() > 0.75 * 256 and (row[answers] >= 256 + QUICK.facts.data.kinds).all()
        )
        assert (row[answers - distances[answers]] == row[answers]).all()
        assert (row[answers - distances[answers] - 1] == row[answers - 1]).all() and distances.max() <= 256


def test_answers_are_found_where_the_text_around_them_counts_as_well(facts):
    config = with_tokenizer(QUICK, "bytes").facts
    counted = dataclasses.replace(config, data=dataclasses.replace(config.data, answers_count=64))
    for one, other in zip(facts.distances, planted.planted(counted, 256, 3).distances, strict=True):
        np.testing.assert_array_equal(one, other)


def test_facts_are_shown_in_words_and_in_bold(model, facts):
    shown = demo.told(model, facts, texts())
    assert len(shown.marked) == 4 * QUICK.facts.data.most and len(shown.text) == 256
    told = [shown.text[token] for token in shown.marked]
    assert all(word.endswith(" lives in") for word in told[::2]) and all(word.endswith(". ") for word in told[1::2])
    assert len(set(told)) <= len(told) / 2  # each is told, and asked for once
    assert len(set(planted.PEOPLE)) == len(set(planted.PLACES)) == QUICK.facts.data.kinds
    assert f"{QUICK.facts.data.most} of them are asked for" in shown.about


def made(nats, right, files=40):
    """What a model of this loss and this share of known repetitions, near and far, would have."""
    asked = np.full((files, 3), 10.0)
    noise = 1 + 0.1 * np.random.default_rng(3).random(files)
    recall = Recall(asked, asked * right, asked * 2.0)
    return Measured(1234, np.full(files, 100), 100 * nats * noise, recall)


def said(hola, others):
    told = {**others, "hola": hola}
    names = {"gdn": "Gated DeltaNet", "hola": "HOLA", "recency": "HOLA + recency"}
    memory, few = MemoryConfig(window=30, block=10, chunk=10), texts()
    return findings.sentences(told, names, memory, few), findings.table(told, names, few)


def test_the_sentences_say_what_was_found_whichever_way_it_came_out():
    better, worse = made(3.0, np.array([0.5, 0.5, 0.3])), made(3.1, np.array([0.5, 0.5, 0.1]))
    (first,), table = said(better, {"gdn": worse})
    assert "below Gated DeltaNet's" in first and "lower on 40 of 40 files" in first
    assert "about as many up to 40 tokens back" in first and "20.0 points more farther back" in first
    (first,), _ = said(worse, {"gdn": better})
    assert "above Gated DeltaNet's" in first and "20.0 points fewer farther back" in first
    (first,), _ = said(better, {"gdn": better})
    assert "differ by less than these files can tell" in first and "about as many farther back" in first
    assert f"{better.perplexity:.2f}" in table and "30.0%" in table and "2.000" in table


def test_a_range_without_repetitions_is_left_open():
    none = dataclasses.replace(made(3.0, np.ones(3)), recall=Recall(*np.zeros((3, 40, 3))))
    names = {"hola": "HOLA"}
    assert findings.table({"hola": none}, names, texts()).count(" -") >= 6
    known = findings.as_json({"hola": none}, texts())["hola"]["known"]
    assert known == {"1-10": None, "11-40": None, "41-80": None} and not math.isnan(none.perplexity)
    memory = MemoryConfig(window=30, block=10, chunk=10)
    drawn = [draw({"hola": none}, names, memory, texts()) for draw in (findings.facts_figure, findings.text_figures)]
    assert "nan" not in "".join(drawn) and [each.count("<figure>") for each in drawn] == [1, 2]


def test_of_facts_it_is_said_what_each_model_answered_from_afar():
    knows, forgets = made(3.0, np.array([0.9, 0.9, 0.8])), made(3.0, np.array([0.9, 0.9, 0.0]))
    memory = MemoryConfig(window=30, block=10, chunk=10)
    (said,) = findings.answered({"gdn": forgets, "hola": knows}, {"gdn": "GDN", "hola": "HOLA"}, memory)
    assert "more than 40 tokens back" in said and "GDN 0.0% (standard error 0.0), HOLA 80.0%" in said
    assert "80.0%" in findings.facts_table({"hola": knows}, {"hola": "HOLA"}, texts())


TINY = ["steps=3", "row=64", "global_batch=2", "log_every=1", "model.layers=1", "model.dim=16", "model.mlp_dim=16"]
TINY += ["model.memory.window=4", "model.memory.chunk=16", "model.memory.block=16"]


@pytest.mark.slow
def test_the_whole_demo_with_few_steps(tmp_path):
    """It trains its runs, here two and two, prints what they reached, and makes a page; so does --quick, of facts alone."""
    folder = tmp_path / "demo"
    fewer = "from train import cli, demo; demo.PLANTED = 8; del demo.ROWS['recency']; cli.main()"
    command = [sys.executable, "-c", fewer, "demo", "--folder", str(folder), "--longest", "128"]
    command += ["--facts", *TINY, "--settings", "model.vocab_size=300"]
    environment = {**os.environ, "XLA_FLAGS": FLAGS}

    def results(*options, found):
        done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        results = json.loads((folder / "results.json").read_text())
        assert all(sentence in done.stdout for sentence in results["found"]) and len(results["found"]) == found
        for name in ("gdn", "hola"):
            assert sum(results["facts"][name]["repeated"].values()) == 8 * FULL.facts.data.most
        return results, done.stdout

    whole, said = results(*TINY, found=3)
    for name in ("gdn", "hola"):
        perplexity = whole["text"][name]["perplexity"]
        assert 100 < perplexity < 400 and f"{perplexity:.2f}" in said  # guessing gives 300
        assert all((folder / kind / name / "checkpoints" / "3").is_dir() for kind in Recipes._fields)
    look_at(folder / "page.html", bars=2)
    quick, said = results("--quick", found=2)  # the same runs: it takes them as they are
    assert quick["facts"] == whole["facts"] and "text" not in quick and said.count("has its 3 steps already") == 2
    look_at(folder / "page.html", bars=0)


def look_at(page, bars):
    if command := browser.found():
        window = browser.Browser(command)
        try:
            window.open(page)
            assert window.ask("document.querySelectorAll('#text .marked').length") == 4 * FULL.facts.data.most
            window.click("#example")
            assert window.ask("document.querySelectorAll('#entries tr').length") > 1
            assert window.ask("document.querySelectorAll('svg rect').length") == bars and not window.failed
        finally:
            window.close()
