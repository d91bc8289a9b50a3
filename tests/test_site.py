"""The site: everything is in it, its links hold, and docstrings and notebooks become pages."""

import importlib
import inspect
import os
import re
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pytest

from tools.docs import notebooks
from tools.docs.docstrings import comment, markdown
from tools.docs.stage import CODE, LINK, stage

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BUILDER = ROOT / ".venv-docs" / "bin" / "python"
NOTEBOOK = """# ---
# jupyter: {}
# ---

# %% [markdown]
# # A try
# See [the results](../docs/results.md#in-short).

# %%
import matplotlib.pyplot as plt

x = 3
plt.plot([1, x])
print("```", x)

# %%
plt.plot([x, 1])
"""


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as Python-Markdown makes them."""
    text = re.sub(r"(?ms)^(```+).*?^\1`*$", "", page.read_text())
    found = set()
    for heading in re.findall(r"(?m)^#+ (.*)$", text):
        plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The staged folder. A notebook that nobody has executed is made up."""
    made = tmp_path_factory.mktemp("notebooks")
    for script in (ROOT / "notebooks").glob("*.py"):
        (made / f"{script.stem}.md").write_text(f"# {script.stem}\n")
    out = tmp_path_factory.mktemp("site") / "docs"
    stage(out, made)
    return out


def test_every_document_is_in_the_menu_and_nothing_else():
    menu = re.findall(r"^ +- (?:\w+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(menu) == sorted(["index.md", *(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))])


def test_every_link_leads_somewhere(site):
    followed = 0
    for page in site.rglob("*.md"):
        for name, anchor in LINK.findall(CODE.sub("", page.read_text())):
            target = Path(os.path.normpath(page.parent / name))
            assert target.is_file(), f"{page.relative_to(site)}: {name}"
            assert not anchor or anchor[1:] in anchors(target), f"{page.relative_to(site)}: {name}{anchor}"
            followed += 1
    assert followed > 50
    assert (site / "source/hola_jax/memory/hola.py.md").is_file()  # the README leads there


def test_the_design_pages_name_tests_that_are_there():
    text = "".join(page.read_text() for page in (DOCS / "design").glob("*.md"))
    laws = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 20 and not [name for name in named if f"def {name}(" not in laws]
    assert not [name for name in re.findall(r"tests/[\w/]+\.py", text) if not (ROOT / name).exists()]


def test_what_is_staged_links_to_where_it_stands(tmp_path):
    root, made, out = tmp_path / "root", tmp_path / "made", tmp_path / "out"
    files = {
        "README.md": "[a](docs/a.md#b) [c](pkg/c.py) `[d](e)`\n\n```\n[f](g)\n```\n",
        "docs/a.md": "[n](../notebooks/1_try.py) [r](../README.md) [runs](runs) [web](https://x.org)",
        "docs/runs/one.json": "{}",
        "pkg/c.py": "x = 1",
        "notebooks/1_try.py": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    made.mkdir()
    (made / "1_try.md").write_text("![Figure 1](1_try-1.svg) [a](../docs/a.md)")
    (made / "1_try-1.svg").write_text("<svg/>")
    stage(out, made, root)
    expected = {
        "index.md": "[a](a.md#b) [c](source/pkg/c.py.md) `[d](e)`\n\n```\n[f](g)\n```\n",
        "a.md": "[n](notebooks/1_try.md) [r](index.md) [runs](source/docs/runs/index.md) [web](https://x.org)",
        "notebooks/1_try.md": "![Figure 1](1_try-1.svg) [a](../a.md)",
        "notebooks/1_try-1.svg": "<svg/>",
    }
    assert {name: (out / name).read_text() for name in expected} == expected
    assert "``````py\nx = 1\n``````" in (out / "source/pkg/c.py.md").read_text()
    assert "[one.json](../../../runs/one.json)" in (out / "source/docs/runs/index.md").read_text()


def test_a_link_to_nothing_is_an_error(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("`[a](b)` and [this](docs/gone.md)")
    with pytest.raises(ValueError, match=r"README.md links to docs/gone.md"):
        stage(tmp_path / "out", tmp_path, tmp_path)


def test_the_api_pages_hold_every_public_name_and_each_is_told():
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    named = set(re.findall(r"(?m)^::: ([\w.]+)$", pages))
    packages = [path for top in ("hola_jax", "pallas_kernels", "train") for path in (ROOT / top).rglob("__init__.py")]
    assert {".".join(p.parent.relative_to(ROOT).parts) for p in packages if "__all__ =" in p.read_text()} <= named
    for name in sorted(named):
        module = importlib.import_module(name)
        assert module.__doc__, name
        own = [
            key for key, value in vars(module).items() if getattr(value, "__module__", None) == name and key[0] != "_"
        ]
        for member in getattr(module, "__all__", own):
            value = getattr(module, member)
            if inspect.isclass(value) or inspect.isfunction(value):
                told = value.__doc__ or ""
                assert told and not told.startswith(f"{member}("), f"{name}.{member} has no docstring"
                left = re.search(r"[^:\s] {3,}\S", CODE.sub("", markdown(inspect.cleandoc(told))))
                assert not left, f"{name}.{member}: the site would show a column as prose"


def test_docstrings_become_markdown():
    assert markdown("Of [B, T] a_b < `[x]`.\n\n    a  b\n") == "Of \\[B, T\\] a\\_b &lt; `[x]`.\n\n    a  b"
    assert (
        markdown("a, b  first\n      and more\nc     *second*")
        == "`a`, `b`\n:   first and more\n\n`c`\n:   \\*second\\*"
    )
    assert (
        markdown("short    text\nlong_one text\nlonger  no column")
        == "short    text\nlong\\_one text\nlonger  no column"
    )
    assert markdown("short    text\nlong_one text") == "`short`\n:   text\n\n`long_one`\n:   text"
    assert markdown("x = f(1)  # one\ny = x") == "```python\nx = f(1)  # one\ny = x\n```"
    assert comment('    x: Float[\n        Array, "# T"\n    ]  # of # it') == "of # it"


def test_a_notebook_becomes_a_page_and_waits_for_a_change(tmp_path):
    script = tmp_path / "notebooks" / "1_try.py"
    script.parent.mkdir()
    script.write_text(NOTEBOOK)
    out = tmp_path / "out"
    notebooks.main(script, out)
    page = (out / "1_try.md").read_text()
    assert page.startswith("# A try\nSee [the results](../docs/results.md#in-short).\n\n````python\nimport matplotlib")
    assert "````text\n``` 3\n````\n\n![Figure 1](1_try-1.svg)" in page and "![Figure 2](1_try-2.svg)" in page
    assert "jupyter" not in page and (out / "1_try-2.svg").read_text().startswith("<?xml")

    made = (out / "1_try.md").stat().st_mtime_ns
    notebooks.main(script, out)
    assert (out / "1_try.md").stat().st_mtime_ns == made, "executed again although nothing changed"
    script.write_text(NOTEBOOK.split("# %%\nplt")[0])
    notebooks.main(script, out)
    assert "Figure 2" not in (out / "1_try.md").read_text() and not (out / "1_try-2.svg").exists()


def test_a_notebook_that_fails_leaves_no_page_behind_and_says_where(tmp_path):
    script = tmp_path / "1_try.py"
    script.write_text("# %%\nprint(1)\n\n# %%\n1 / 0\n")
    with pytest.raises(ZeroDivisionError) as error:
        notebooks.main(script, tmp_path / "out")
    assert error.traceback[-1].lineno == 4 and not list((tmp_path / "out").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not BUILDER.exists(), reason="`make docs` makes the environment that builds the site")
@pytest.mark.parametrize("wrong", ["", "[no](#anchor)", "::: hola_jax.no_such_name", "$\\nosuchthing$"])
def test_the_site_builds_and_tolerates_nothing_wrong(site, tmp_path, wrong):
    docs, out = tmp_path / "docs", tmp_path / "out"
    shutil.copytree(site, docs)
    with (docs / "scores.md").open("a") as page:
        page.write(f"\n{wrong}\n")
    environment = {**os.environ, "HOLA_DOCS": str(docs), "NO_MKDOCS_2_WARNING": "1"}
    build = [str(BUILDER), "-m", "mkdocs", "build", "--site-dir", str(out)]
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (wrong == ""), done.stdout + done.stderr
    if not wrong:
        memory = (out / "api" / "memory.html").read_text()
        assert 'id="hola_jax.memory.hola_memory"' in memory and "rows of the exact cache" in memory
        text = "".join(page.read_text() for page in out.rglob("*.html"))
        loaded = re.findall(r'(?:src|rel="stylesheet" href)="([^"]+)"', text)
        assert loaded and not [src for src in loaded if re.match(r"(https?:)?//", src)], "the site would need a network"
