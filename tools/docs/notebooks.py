"""Executes one notebook, a script in cells, and writes what it says, does, prints and draws as Markdown.

    python tools/docs/notebooks.py notebooks/1_memory.py build/notebooks

Cells begin with `# %%`, those of text with `# %% [markdown]`. Behind a cell of code stands what it printed and each figure
that it left open in matplotlib. A notebook is executed again when it, this file, the library or jax is another than when it
was executed last.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SOURCES = ("hola_jax", "pallas_kernels", "train", "configs")


class Cell(NamedTuple):
    text: str
    line: int  # of its first line in the file
    is_text: bool


def cells(source: str) -> list[Cell]:
    """The cells that hold anything; what stands before the first marker is code, but for jupytext's header."""
    source = re.sub(r"\A# ---\n(?:#.*\n)*?# ---\n", lambda header: "\n" * header[0].count("\n"), source)
    found: list[tuple[int, bool, list[str]]] = [(1, False, [])]
    for number, line in enumerate(source.splitlines(), start=1):
        if re.match(r"# %%(\s|$)", line):
            found.append((number + 1, "[markdown]" in line, []))
        else:
            found[-1][2].append(re.sub(r"^# ?", "", line) if found[-1][1] else line)
    return [Cell("\n".join(lines).rstrip(), line, is_text) for line, is_text, lines in found if "".join(lines).strip()]


def fingerprint(notebook: Path) -> str:
    """Of all that a notebook's answer depends on."""
    digest = hashlib.sha256()
    for path in [notebook, Path(__file__), *sorted(path for name in SOURCES for path in (ROOT / name).rglob("*.py"))]:
        digest.update(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}\0".encode())
        digest.update(path.read_bytes())
    for package in ("jax", "matplotlib"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()


def execute(notebook: Path, folder: Path) -> str:
    """The page. Figures are written into `folder` as NAME-1.svg, NAME-2.svg, ..."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = notebook.stem  # the same figure, the same bytes
    import matplotlib.pyplot as plt

    names = {"__name__": "__main__", "__file__": str(notebook)}
    parts, figures = [], 0
    for cell in cells(notebook.read_text()):
        if cell.is_text:
            parts.append(cell.text)
            continue
        parts.append(fenced(cell.text.strip("\n"), "python"))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (cell.line - 1) + cell.text, str(notebook), "exec"), names)
        if printed.getvalue().strip():
            parts.append(fenced(printed.getvalue().rstrip(), "text"))
        for number in plt.get_fignums():
            figures += 1
            name = f"{notebook.stem}-{figures}.svg"
            plt.figure(number).savefig(folder / name, bbox_inches="tight", metadata={"Date": None})
            parts.append(f"![Figure {figures}]({name})")
        plt.close("all")
    return "\n\n".join(parts) + "\n"


def fenced(text: str, language: str) -> str:
    """A block of code, within a fence longer than any in it."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall(r"`{3,}", text))])
    return f"{fence}{language}\n{text}\n{fence}"


def main(notebook: Path, folder: Path) -> None:
    page, stamp = folder / f"{notebook.stem}.md", folder / f"{notebook.stem}.sha256"
    wanted = fingerprint(notebook)
    if page.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"executing {notebook}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    for old in [stamp, page, *folder.glob(f"{notebook.stem}-*.svg")]:
        old.unlink(missing_ok=True)
    sys.path[:1] = [str(notebook.parent), str(ROOT)]  # as if it were run by itself, with the library beside it
    page.write_text(execute(notebook, folder))
    stamp.write_text(wanted)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
