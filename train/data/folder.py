"""Sources without preparation: the standard library's text and any folder of text files, a file a document."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from pathlib import Path

import numpy as np

from train.data import tokenizers
from train.data.config import LibraryText, Split, TextFolder
from train.sources import HELD_OUT, library_files


def texts(source: LibraryText | TextFolder, split: Split) -> dict[str, str]:
    """The split's files: their texts by their names below the folder."""
    if isinstance(source, LibraryText):
        root = Path(sysconfig.get_path("stdlib"))
        files, share = library_files(root), 1 / HELD_OUT
    else:
        root = Path(source.path)
        files, share = _matching(source), source.held_out
    names = {path: path.relative_to(root) for path in files}
    chosen = [path for path in files if _held_out(names[path], share) == (split == "held_out")]
    if not chosen:
        raise ValueError(
            f"none of the {len(files)} files below {root} falls to the {split} split; add files or hold out others"
        )
    replace = isinstance(source, LibraryText)  # it has a few files in old encodings
    return {names[path].as_posix(): _text(path, replace) for path in chosen}


def documents(source: LibraryText | TextFolder, split: Split) -> tuple[list[np.ndarray], tokenizers.Tokenizer]:
    """(the tokens of each of the split's files, the tokenizer they are of)."""
    if isinstance(source, LibraryText):
        return _library(source, split)
    return _encoded(source, split)


@functools.lru_cache(maxsize=4)  # it does not change while a process runs, and a demo or a study opens it often
def _library(source: LibraryText, split: Split) -> tuple[list[np.ndarray], tokenizers.Tokenizer]:
    return _encoded(source, split)


def _encoded(source: LibraryText | TextFolder, split: Split) -> tuple[list[np.ndarray], tokenizers.Tokenizer]:
    found, tokenizer = texts(source, split), tokenizers.load(source.tokenizer)
    return tokenizer.encode(list(found.values())), tokenizer


def _matching(source: TextFolder) -> list[Path]:
    root = Path(source.path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; give one with text files")
    files = sorted(path for path in root.glob(source.pattern) if path.is_file())
    if not files:
        raise FileNotFoundError(f"{root} holds no files {source.pattern}; give another folder or pattern")
    return files


def _held_out(name: Path, share: float) -> bool:
    digest = hashlib.blake2b(name.as_posix().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _text(path: Path, replace: bool) -> str:
    try:
        return path.read_bytes().decode(errors="replace" if replace else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it or leave it out"
        ) from error
