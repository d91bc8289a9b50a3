"""Safetensors on the disk: what a folder or a file holds, read tensor by tensor, written whole or not at all.

Never pickle. The safetensors library checks a file's header against its length before anything is read: a file that is cut
short, whose offsets overlap or whose shapes do not fit its bytes is refused here, by name, and no memory is taken for it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 2 * 2**30
FOR_TRANSFORMERS = {"format": "pt"}  # without which transformers takes no file


class Stored(NamedTuple):
    """One tensor of a file, as its header describes it."""

    file: Path
    dtype: str  # as safetensors spells it: "F32", "BF16", ...
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def stored(path: Path) -> dict[str, Stored]:
    """What a safetensors file, or a folder of them, holds; only headers are read."""
    if path.is_file():
        return _header(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if (path / INDEX).is_file():
        return _sharded(path)
    if (path / SINGLE).is_file():
        return _header(path / SINGLE)
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    hint = f"; it has {', '.join(pickled[:3])}, but pickle is never read: save it as safetensors" if pickled else ""
    raise FileNotFoundError(f"{path} holds neither {SINGLE} nor {INDEX}{hint}")


def _header(file: Path) -> dict[str, Stored]:
    with _opened(file) as tensors:
        names: list[str] = tensors.keys()
        slices = {key: tensors.get_slice(key) for key in names}
        return {key: Stored(file, str(x.get_dtype()), tuple(x.get_shape())) for key, x in slices.items()}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="np") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or no safetensors file ({error})") from error


def _sharded(folder: Path) -> dict[str, Stored]:
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from keys to file names")
    found: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{folder / INDEX} names the file {name!r}, which is not in {folder}")
        twice = sorted(found.keys() & (held := _header(folder / name)).keys())
        if twice:
            raise ValueError(f"{folder} holds {twice[0]} twice, in {found[twice[0]].file.name} and in {name}")
        found |= held
    wrong = [f"{key} in {name}" for key, name in places.items() if key not in found or found[key].file.name != name]
    if wrong:
        raise ValueError(f"{folder / INDEX} promises {', '.join(wrong[:8])}, which the files do not hold")
    return found


def read(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, np.ndarray]]:
    """(key, numbers) of each, file by file."""
    for file in sorted({x.file for x in tensors.values()}):
        with _opened(file) as opened:
            for key, x in tensors.items():
                if x.file == file:
                    yield key, opened.get_tensor(key)


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}")
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; it must hold an object")
    return values


def write(
    folder: Path, sizes: Mapping[str, int], make: Callable[[str], np.ndarray], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a tensor for each key of `sizes`, which says its bytes; above `shard_bytes` in several files with an index.
    A tensor is made when the file that it goes to is written."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for key, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(key)
        room -= size
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = [SINGLE] if len(shards) == 1 else names
    for name, keys in zip(names, shards, strict=True):
        arrays = {key: np.ascontiguousarray(make(key)) for key in keys}
        write_file(folder / name, arrays)
    if len(shards) > 1:
        places = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(file: Path, arrays: dict[str, np.ndarray], about: Mapping[str, str] = FOR_TRANSFORMERS) -> None:
    """A safetensors file with `about` in its header."""
    file.touch()
    mode = file.stat().st_mode  # of any new file here; the library's own choice is the owner alone
    save_file(arrays, file, metadata=dict(about))
    file.chmod(mode)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A new file beside `file` to write, which takes its name and place in the end; after an error nothing is left."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into, which takes its name in the end; after an error nothing is left."""
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already; give the name of a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    part.mkdir()
    try:
        yield part
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
