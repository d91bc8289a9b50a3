"""Gathers what the site is made of in one folder: README.md as its home, docs/, the executed notebooks, and a page for each
source file that one of those links to.

    python tools/docs/stage.py build/docs build/notebooks

Links are made to fit; one to something that is not there is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
CODE = re.compile(r"^(```+)[^\n]*\n.*?^\1`*$|^    [^\n]*$|(`+)[^\n]*?\2", re.MULTILINE | re.DOTALL)
UNLISTED = "---\nhide: [navigation, toc]\nsearch:\n  exclude: true\n---\n\n"


def stage(out: Path, notebooks: Path, root: Path = ROOT) -> None:
    """Makes the folder `out` anew. `notebooks` holds what tools/docs/notebooks.py made of root/notebooks."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(root / "docs", out)
    pages = {root / "README.md": out / "index.md"}
    pages |= {path: out / path.relative_to(root / "docs") for path in sorted((root / "docs").rglob("*.md"))}
    (out / "notebooks").mkdir(exist_ok=True)
    pages |= {path: out / "notebooks" / path.name for path in sorted((root / "notebooks").glob("*.md"))}
    for script in sorted((root / "notebooks").glob("*.py")):
        for figure in notebooks.glob(f"{script.stem}-*.svg"):
            shutil.copy(figure, out / "notebooks")
        pages[script] = out / "notebooks" / f"{script.stem}.md"
    linked: set[Path] = set()
    for source, page in pages.items():
        text = (notebooks / page.name if source.suffix == ".py" else source).read_text()
        page.write_text(_fitted(text, source, page, out, root, linked))
    for target in sorted(linked - set(pages)):
        place = _place(target, out, root)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(UNLISTED + _listing(target, place, out, root))


def _fitted(text: str, source: Path, page: Path, out: Path, root: Path, linked: set[Path]) -> str:
    """The page's text with links that hold where it stands; adds to `linked` what they lead to and is no page or picture."""

    def fitted(link: re.Match[str]) -> str:
        name, anchor = link[1], link[2] or ""
        target = Path(os.path.normpath(source.parent / name))
        if source.suffix == ".py" and (page.parent / name).exists():  # a figure of a notebook
            return link[0]
        if not target.exists():
            raise ValueError(f"{source.relative_to(root)} links to {name}, which is not there")
        place = _place(target, out, root)
        if not place.exists():
            linked.add(target)
        return os.path.relpath(place, page.parent) + anchor

    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [LINK.sub(fitted, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(fitted, text[end:])])


def _place(target: Path, out: Path, root: Path) -> Path:
    """Where in the site something of the repository is shown."""
    if target == root / "README.md":
        return out / "index.md"
    if target.is_dir():
        return out / "source" / target.relative_to(root) / "index.md"
    if target.is_relative_to(root / "docs"):
        return out / target.relative_to(root / "docs")
    if target.parent == root / "notebooks":
        return out / "notebooks" / f"{target.stem}.md"
    return out / "source" / f"{target.relative_to(root)}.md"


def _listing(target: Path, place: Path, out: Path, root: Path) -> str:
    """A source file, or what a folder of docs/ holds, as a page."""
    name = target.relative_to(root)
    if target.is_dir():
        files = [(path.relative_to(target), _place(path, out, root)) for path in sorted(target.rglob("*.*"))]
        return f"# {name}/\n\n" + "".join(f"* [{path}]({os.path.relpath(to, place.parent)})\n" for path, to in files)
    return f"# {name}\n\n``````{target.suffix[1:]}\n{target.read_text()}\n``````\n"


if __name__ == "__main__":
    stage(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
