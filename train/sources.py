"""The text that every machine with Python has."""

from __future__ import annotations

import sysconfig
from pathlib import Path

HELD_OUT = 10  # one file in so many
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings", "__pycache__"}


def library_files(root: Path | None = None) -> list[Path]:
    """The standard library's own source files, in the order of their names, without its tests and tables."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(root).parts)]
    if not files:
        raise FileNotFoundError(
            f"{root} holds no .py files: this Python came without the source of its standard library"
        )
    return files
