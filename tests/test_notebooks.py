"""The notebooks: each is a jupytext script that asks, plots, answers with a number, and leaves nothing behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny_run import FLAGS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
HEADER = re.compile(r"# ---\n# jupyter:\n(#   .*\n)+# ---\n")
CELL = re.compile(r"^# %%( \[markdown\])?$")
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path):
    """[(whether it is prose, its lines)] of a script in jupytext's percent format."""
    text = path.read_text()
    header = HEADER.match(text)
    assert header and "format_name: percent" in header[0], "the jupytext header is not there"
    found = []
    for line in text[header.end() :].splitlines():
        if line.startswith("# %%"):
            mark = CELL.match(line)
            assert mark, f"{line!r} begins no cell"
            found.append((bool(mark[1]), []))
        elif found:
            found[-1][1].append(line)
        else:
            assert not line, f"{line!r} stands before the first cell"
    return found


def prose(path):
    return "\n".join(line for is_prose, lines in cells(path) if is_prose for line in lines)


def test_there_are_seven_and_their_page_names_them():
    assert [path.stem.split("_")[0] for path in NOTEBOOKS] == [str(number) for number in range(1, 8)]
    page = (ROOT / "notebooks" / "README.md").read_text()
    assert re.findall(r"\]\((\d_\w+\.py)\)", page) == [path.name for path in NOTEBOOKS]


@each
def test_cells_are_prose_or_code(path):
    for is_prose, lines in cells(path):
        assert any(lines), "a cell is empty"
        if is_prose:
            assert all(not line or line == "#" or line.startswith("# ") for line in lines), "prose is in comments"
        else:
            code = "\n".join(lines)
            compile(code, path.name, "exec")
            assert len(re.findall(r"\bplt\.subplots\(", code)) <= 1, "one figure to a cell"


@each
def test_a_notebook_asks_and_says_what_to_try_next(path):
    text = prose(path)
    assert re.match(rf"# # {path.stem[0]}\. ", text), "it begins with its number and title"
    assert "**Question.**" in text and "?" in text
    headings = re.findall(r"^# ## (.*)$", text, flags=re.MULTILINE)
    assert headings[-1] == "What to try next"
    assert cells(path)[-1][0] and text.count("\n# * ", text.index("## What to try next")) >= 3


@each
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", prose(path)):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.slow
@each
def test_it_runs_plots_and_answers(path, tmp_path):
    """Runs it, as a script, where nothing else is. Its own assertions are what is tested."""
    draws = """
import runpy, sys
runpy.run_path(sys.argv[1], run_name="__main__")
import matplotlib.pyplot as plt
assert plt.get_fignums(), "it draws nothing"
for number in plt.get_fignums():
    figure = plt.figure(number)
    figure.canvas.draw()
    assert all(axes.get_xlabel() for axes in figure.axes if not axes.get_label() == "<colorbar>"), "an axis has no name"
"""
    mine = {"MPLBACKEND": "Agg", "XLA_FLAGS": FLAGS, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    (tmp_path / "cwd").mkdir()
    before = listing()
    done = subprocess.run(
        [sys.executable, "-c", draws, str(path)],
        cwd=tmp_path / "cwd",
        env=os.environ | mine,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = [line for line in done.stdout.splitlines() if line.startswith("ANSWER: ")]
    assert len(answer) == 1 and re.search(r"\d", answer[0])
    assert not list((tmp_path / "cwd").iterdir())
    assert listing() == before


def listing():
    """What lies in the repository where a notebook might leave something."""
    return {path for folder in (ROOT, ROOT / "notebooks") for path in folder.iterdir() if path.name[0] not in "._"}
