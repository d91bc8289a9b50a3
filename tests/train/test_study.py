"""Studies: what is done stays done, what is killed is made again, what does not belong is refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.tiny_run import FLAGS
from train.study import Measure, Study
from train.study.command import RunStudy
from train.study.config import Cell, load
from train.study.page import write_page
from train.study.plot import svg, ticks
from train.study.results import read_results, table, write_result

FILE = """
from hola_jax import MemoryConfig, ModelConfig
from train.config import CheckpointConfig, TrainConfig
from train.data.config import Facts
from train.optimizer import OptimizerConfig
from train.study import Measure, Study

MODEL = ModelConfig(vocab_size=24, dim=16, layers=1, heads=1, key_dim=4, value_dim=4, mlp_dim=16, dtype="float32",
                    memory=MemoryConfig(window=2, block=8, chunk=8))
TASK = Facts(most=2, asked=1, kinds=8)
study = Study(
    title="A small study",
    question="Does it run?",
    base=TrainConfig(run="", model=MODEL, data=TASK, optimizer=OptimizerConfig(warmup=2), steps={steps},
                     global_batch=2, row=16, checkpoint=CheckpointConfig(every=2, keep=1, keep_best=0),
                     eval_every=2, eval_batches=1, log_every=2),
    rows={{"plain": {{"model.mixer": "gated_deltanet"}}, "hola": {{}}}},
    measures={{"hits": Measure(TASK, rows=5), "perplexity": Measure(TASK, shows="perplexity", rows=3, length=24)}},
    seeds=(0, 1),
)
"""


def written(folder: Path, steps: int = 4) -> str:
    path = folder / "small.py"
    path.write_text(FILE.format(steps=steps))
    return str(path)


def made_up(study: Study, cell: Cell, nats: float = 1.0) -> dict:
    measures = {name: {"nats": nats, "accuracy": 0.5 + 0.1 * cell.seed, "tokens": 5} for name in study.measures}
    curve = [[32, 2.0], [64, nats]]
    return {
        "row": cell.row,
        "seed": cell.seed,
        "settings": study.settings(cell),
        "measures": measures,
        "curve": curve,
    }


@pytest.fixture
def one_device(monkeypatch):
    """For the runs, which are processes of their own and take the environment."""
    monkeypatch.setenv("XLA_FLAGS", FLAGS)


@pytest.mark.slow
def test_a_study_runs_measures_and_goes_on_with_what_is_left(tmp_path, capsys, one_device):
    file = written(tmp_path)
    study, folder = load(file), tmp_path / "results" / "small"
    asked = dict(results=str(tmp_path / "results"), runs=str(tmp_path / "runs"), page=str(tmp_path / "page.md"))
    write_result(folder, Cell("hola", 1), made_up(study, Cell("hola", 1)))
    RunStudy((file,), only=("plain",), seeds=(0,), **asked).run()
    assert "2 of 4 runs are left: hola.0, plain.1" in capsys.readouterr().out
    result = json.loads((folder / "plain.0.json").read_text())
    assert result["measures"]["hits"]["tokens"] == 5 and result["measures"]["perplexity"]["tokens"] == 3
    assert [tokens for tokens, _ in result["curve"]] == [64, 128] and result["parameters"] > 1000
    before = (folder / "plain.0.json").stat().st_mtime_ns
    RunStudy((file,), only=("plain",), seeds=(0,), **asked).run()  # nothing to do
    assert (folder / "plain.0.json").stat().st_mtime_ns == before
    page = (tmp_path / "page.md").read_text()
    assert "2 of 4 runs are done" in page and "(results/small.svg)" in page and "| hola |" in page


@pytest.mark.slow
def test_a_run_that_is_killed_is_made_again_and_loses_nothing(tmp_path, one_device):
    file = written(tmp_path, steps=100_000)
    command = [sys.executable, "-m", "train.cli", "study", file, "--only", "plain", "--seeds", "0"]
    paths = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    with subprocess.Popen(
        [*command, *paths], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as study:
        checkpoints = tmp_path / "runs/small/plain.0/checkpoints"
        run = _child(study.pid, checkpoints)
        os.kill(run, signal.SIGKILL)
        again = _child(study.pid, checkpoints, besides=run)
        assert again != run
        study.send_signal(signal.SIGTERM)  # as of a machine that goes: the run saves and stops too
        _, said = study.communicate(timeout=120)
    assert "plain.0 ended with -9" in said and "it is tried again" in said and study.returncode
    log = (tmp_path / "runs/small/plain.0.log").read_text()
    assert "resuming" in log and not list((tmp_path / "results").rglob("*.json"))


def _child(parent: int, checkpoints: Path, besides: int = 0) -> int:
    """The study's run, once it has a checkpoint."""

    def whole() -> set[str]:
        return {path.name for path in checkpoints.glob("*") if path.name.isdecimal()}

    begun, seen = time.monotonic(), whole()
    while time.monotonic() - begun < 240:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if whole() - seen and children and int(children[0]) != besides:
            return int(children[0])
        time.sleep(0.1)
    raise AssertionError("no run made a checkpoint")


def test_a_run_of_another_study_is_not_made_twice(tmp_path, capsys):
    file = written(tmp_path)
    study = load(file)
    for cell in study.cells():
        write_result(tmp_path / "results" / "other", Cell(f"their-{cell.row}", cell.seed), made_up(study, cell, 2.0))
    (tmp_path / "results" / "other" / "broken.0.json").write_text("no result")
    RunStudy((file,), results=str(tmp_path / "results"), runs=str(tmp_path / "runs")).run()
    said = capsys.readouterr()
    assert "hola.1 is the run of" in said.err and "their-hola.1.json" in said.err and "are left" not in said.out
    results = read_results(study, tmp_path / "results" / "small")
    assert [results[cell]["row"] for cell in study.cells()] == [cell.row for cell in study.cells()]
    assert not any((tmp_path / "runs").rglob("*.log"))


def test_the_table_compares_seed_by_seed(tmp_path):
    study = load(written(tmp_path))
    results = {
        cell: made_up(study, cell, {"plain": 1.0, "hola": 0.9 + 0.2 * cell.seed}[cell.row]) for cell in study.cells()
    }
    lines = table(study, results)
    assert lines[0] == "|  | hits | perplexity | runs |"
    assert lines[2] == "| plain | 0.550 ± 0.071 | 2.72 ± 0.00 | 2 |"
    assert lines[3] == "| hola | 0.550 ± 0.071 (0/2) | 2.73 ± 0.39 (1/2) | 2 |"
    sinks = dataclasses.replace(study, measures={**study.measures, "sink": Measure(study.base.data, shows="sink")})
    for cell, result in results.items():  # the first row's model has none
        result["measures"]["sink"] = {"sink": None if cell.row == "plain" else 0.25}
    assert [line.split(" | ")[3] for line in table(sinks, results)[2:]] == ["", "0.25 ± 0.00"]
    del results[Cell("hola", 1)], results[Cell("plain", 0)], results[Cell("plain", 1)]
    assert table(study, results)[2:] == ["| plain |  |  | 0 |", "| hola | 0.500 | 2.46 | 1 |"]


def test_a_page_keeps_its_prose(tmp_path):
    study, page = load(written(tmp_path)), tmp_path / "docs/results.md"
    results = {Cell("hola", 0): made_up(study, Cell("hola", 0))}
    folder = tmp_path / "docs/results/small"
    folder.mkdir(parents=True)
    write_page(page, study, results, folder, "hola study small.py")
    page.write_text(page.read_text().replace("# Results", "# What was found\n\nProse.") + "\nMore prose.\n")
    results[Cell("plain", 0)] = made_up(study, Cell("plain", 0))
    write_page(page, study, results, folder, "hola study small.py")
    text = page.read_text()
    assert text.startswith("# What was found\n\nProse.") and text.endswith("\nMore prose.\n")
    assert "2 of 4 runs are done" in text and "1 of 4 runs" not in text and text.count("### A small study") == 1
    assert "(results/small.svg)" in text and (tmp_path / "docs/results/small.svg").read_text().startswith("<svg")
    longer = dataclasses.replace(study.measures["hits"], length=64)
    both = dataclasses.replace(study, measures={**study.measures, "far": longer}, across=("hits", "far"))
    write_page(page, both, {cell: made_up(both, cell) for cell in both.cells()}, folder, "hola study small.py")
    assert "(results/small-lengths.svg)" in page.read_text()
    picture = (tmp_path / "docs/results/small-lengths.svg").read_text()
    assert ">16</text>" in picture and ">64</text>" in picture and ">accuracy</text>" in picture
    page.write_text(text.replace("<!-- end of study small -->", ""))
    with pytest.raises(ValueError, match="put that back"):
        write_page(page, study, results, folder, "hola study small.py")


def test_a_plot_has_a_line_for_each_name_where_all_runs_have_points():
    text = svg(
        {"a & b": [[(0, 2.0), (10, 1.0)], [(0, 2.2), (10, 1.2), (20, 1.0)]], "c": [[(0, 3.0)]]}, "tokens", "nats"
    )
    assert text.count("<polyline") == 2 + 2 and "a &amp; b" in text  # "c" has a single run
    line = text.split('points="')[3].split('"')[0]
    assert len(line.split()) == 2
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    ends = [svg({"a": [[(1, 0.0), (4, 1.0), (16, 2.0)]]}, "x", "y", logarithmic=log) for log in (False, True)]
    middles = [float(end.split('points="')[1].split()[1].split(",")[0]) for end in ends]
    assert middles[0] < middles[1] == pytest.approx((64 + 640 - 150) / 2)
    with pytest.raises(ValueError, match="nothing to plot"):
        svg({"a": [[(0, 1.0)], [(1, 1.0)]]}, "x", "y")


def test_results_of_other_settings_and_broken_ones_are_refused(tmp_path):
    study, cell = load(written(tmp_path)), Cell("hola", 0)
    write_result(tmp_path, cell, made_up(study, cell))
    assert read_results(study, tmp_path).keys() == {cell}
    older = made_up(study, cell)
    del older["settings"]["train"]["nan_limit"], older["settings"]["measures"]["hits"]["length"]
    write_result(tmp_path, cell, older)  # by a version that did not have these settings yet
    assert read_results(study, tmp_path).keys() == {cell}
    other = load(written(tmp_path, steps=6))
    with pytest.raises(ValueError, match=r"hola\.0\.json was made with other settings \(train.steps: 4 -> 6\)"):
        read_results(other, tmp_path)
    (tmp_path / "hola.0.json").write_text("{}")
    with pytest.raises(ValueError, match="is no result of a study"):
        read_results(study, tmp_path)


def test_what_is_wrong_with_a_study_is_said_before_it_runs(tmp_path):
    file = written(tmp_path)
    for options, words in (
        ({"only": ("hloa",)}, "--only names 'hloa'; the study has plain, hola"),
        ({"seeds": (7,)}, "--seeds names 7; the study has 0, 1"),
        ({"jobs": 0}, "--jobs is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            RunStudy((file,), results=str(tmp_path / "results"), **options).run()
    with pytest.raises(ValueError, match="no study is named"):
        RunStudy(()).run()
    with pytest.raises(FileNotFoundError, match="no study file"):
        load(tmp_path / "none.py")
    study = load(file)
    for wrong, words in (
        ({"rows": {}}, "no rows"),
        ({"rows": {"a b": {}}}, "names files"),
        ({"rows": {"a": {"model.mxier": "hola"}}}, "row a: --model.mxier is no setting .* --model.mixer"),
        ({"seeds": (1, 1)}, "one twice"),
        ({"across": ("far",)}, "names 'far'; the study measures hits, perplexity"),
        ({"across": ("sink",), "measures": {"sink": Measure(study.base.data, shows="sink")}}, "show sink; all must"),
        ({"across": ("hits", "perplexity")}, "show accuracy, perplexity; all must show the same"),
    ):
        with pytest.raises(ValueError, match=words):
            Study(**{**{name: getattr(study, name) for name in study.__dataclass_fields__}, **wrong})


@pytest.mark.parametrize("file", sorted(Path("configs/study").glob("[!_c]*.py")), ids=lambda path: path.stem)
def test_the_studies_of_this_repository_are_whole(file):
    study = load(file)
    assert len(study.cells()) == len(study.rows) * len(study.seeds) and len(study.rows) >= 3
    read_results(study, Path("docs/results") / file.stem)  # those kept in the repository belong to it
