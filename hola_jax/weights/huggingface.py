"""A model from and to a Hugging Face folder: config.json beside safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hola_jax.config import DType, ModelConfig
from hola_jax.model import Params, named
from hola_jax.weights import files
from hola_jax.weights.aliases import pattern, read_aliases, renamed
from hola_jax.weights.fields import config_of, hugging_face
from hola_jax.weights.files import Stored
from hola_jax.weights.tables import Row, abstract_params, as_stored, at, kept_type, ours, rows, shape_there, theirs

TYPES = ("F32", "BF16", "F16")


def load(
    folder: Path | str,
    *,
    aliases: Path | str | None = None,
    dtype: DType | None = "float32",
    put: Callable[[np.ndarray], Any] = jax.device_put,
) -> tuple[ModelConfig, Params]:
    """(configuration, parameters) of a folder in flash-linear-attention's layout.

    aliases  a file that explains other names (see `hola_jax.weights.aliases`)
    dtype    of the matrices; vectors are float32. None leaves every tensor the type that it was stored with
    put      where each parameter goes as soon as it is read; `lambda x: x` keeps NumPy arrays
    """
    found = _look(Path(folder), aliases)
    keys = {key: name for name, key in found.names.items()}
    params = _read(found.config, found.tensors, keys, dtype, put)
    if found.tied is not None:
        _check_tied({found.names["lm_head.weight"]: found.tied}, params, Path(folder))
    return found.config, params


def configuration(folder: Path | str, *, aliases: Path | str | None = None) -> ModelConfig:
    """The model that a folder holds, checked as `load` does; no numbers are read."""
    return _look(Path(folder), aliases).config


class _Folder(NamedTuple):
    """A folder whose config.json and headers agree."""

    config: ModelConfig
    tensors: dict[str, Stored]  # by their names in our tables
    names: dict[str, str]  # in our tables: in the files
    tied: Stored | None  # a head that is stored although it is the embedding


def _look(folder: Path, aliases: Path | str | None) -> _Folder:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    where, meaning = folder / "config.json", read_aliases(aliases)
    said = {**files.read_json(where), **meaning.config}
    held = files.stored(folder)
    names = renamed(held, meaning)
    tensors = {name: held[key] for name, key in names.items()}
    tied = _tied_head(said, tensors)
    config, wrong = config_of(said, tensors, where)
    wrong += _key_problems(config, tensors, names)
    if wrong:
        raise ValueError(f"{folder} is not the {config.mixer} that its config.json tells of:\n  " + "\n  ".join(wrong))
    return _Folder(config, tensors, names, tied)


def _tied_head(said: Mapping[str, Any], tensors: dict[str, Stored]) -> Stored | None:
    """Takes out a head that is stored although it is the embedding."""
    if said.get("tie_word_embeddings") and "lm_head.weight" in tensors:
        return tensors.pop("lm_head.weight")
    return None


def _check_tied(head: dict[str, Stored], params: Params, folder: Path) -> None:
    ((_, numbers),) = files.read(head)
    if not np.array_equal(numbers, np.asarray(params["embedding"]).astype(numbers.dtype)):
        raise ValueError(f"{folder} has an lm_head.weight that is not its embedding, and says tie_word_embeddings=true")


def _places(config: ModelConfig) -> Iterator[tuple[str, Row, int | None]]:
    """(key, row, layer) of every tensor, in the order of a forward pass."""
    table = rows(config)
    ends = {row.key: row for row in table if "{i}" not in row.key}
    yield "model.embeddings.weight", ends.pop("model.embeddings.weight"), None
    for layer in range(config.layers):
        for row in table:
            if "{i}" in row.key:
                yield row.key.replace("{i}", str(layer)), row, layer
    for key, row in ends.items():
        yield key, row, None


def _key_problems(config: ModelConfig, tensors: Mapping[str, Stored], names: Mapping[str, str]) -> list[str]:
    """A line for each key that is missing, unknown, or of another shape; layers alike share a line."""
    shapes = abstract_params(config)
    missing, misshapen, expected = [], [], set()
    for key, row, layer in _places(config):
        whole = at(shapes, row.path).shape
        needed = shape_there(row, whole if layer is None else whole[1:])
        expected.add(key)
        if key not in tensors:
            missing.append((key, str(list(needed))))
        elif as_stored(row, tensors[key].shape) != needed or tensors[key].dtype not in TYPES:
            allowed = "" if tensors[key].dtype in TYPES else f" of {', '.join(TYPES)}"
            misshapen.append((names[key], f"{tensors[key]}, needed is {list(needed)}{allowed}"))
    unknown = [(names[key], str(x)) for key, x in tensors.items() if key not in expected]
    return [*_lines("missing", missing), *_lines("unknown", unknown), *_lines("wrong", misshapen)]


def _lines(what: str, keys: list[tuple[str, str]]) -> list[str]:
    return [f"{what}: {key} {shape}" for key, shape in grouped(keys)]


def grouped(keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Keys with what is said of them, those of layers that are alike together: model.layers.{0-23}.attn.A_log."""
    groups: dict[tuple[str, str], list[int]] = {}
    for key, about in keys:
        general, number = pattern(key)
        groups.setdefault((general, about), []).extend([] if number is None else [number])
    return [(key.replace("{i}", _spans(numbers)), about) for (key, about), numbers in groups.items()]


def _spans(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    said = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return said if len(numbers) == 1 else f"{{{said}}}"


def _read(
    config: ModelConfig,
    tensors: Mapping[str, Stored],
    meant: Mapping[str, str],
    dtype: DType | None,
    put: Callable[[np.ndarray], Any],
) -> Params:
    """The parameters, each put where it belongs when its last layer is read."""
    places = {key: (row, layer) for key, row, layer in _places(config)}
    names = {name: key for key, name in meant.items()}
    shapes = abstract_params(config)
    params: Params = {}
    for row in rows(config):
        whole = at(shapes, row.path)
        keys = [key for key, (other, _) in places.items() if other is row]
        layered = "{i}" in row.key
        kinds = {tensors[key].dtype for key in keys}
        if dtype is None and len(kinds) > 1:
            raise ValueError(f"{row.key} is stored as {' and '.join(sorted(kinds))}; give one dtype for it")
        stacked: np.ndarray | None = None
        for stored_key, numbers in files.read({names[key]: tensors[key] for key in keys}):
            layer = places[meant[stored_key]][1]
            numbers = ours(row, numbers)
            if stacked is None:
                stacked = np.empty(whole.shape, kept_type(dtype, whole if dtype else numbers, layered))
            stacked[... if layer is None else layer] = numbers.astype(stacked.dtype)
        assert stacked is not None
        _place(params, row.path, put(stacked))
    return params


def _place(params: Params, path: str, x: Any) -> None:
    *outer, last = path.split(".")
    for name in outer:
        params = params.setdefault(name, {})
    params[last] = x


def save(
    folder: Path | str,
    config: ModelConfig,
    params: Params,
    *,
    dtype: DType | None = None,
    extra: Mapping[str, Any] | None = None,
    shard_bytes: int = files.SHARD_BYTES,
) -> None:
    """Writes a folder in flash-linear-attention's layout that `load` reads back bit for bit; all of it or nothing.

    dtype        of the matrices; vectors are float32. None leaves every parameter the type that it has
    extra        more fields of config.json, such as {"eos_token_id": 2}
    shard_bytes  above so many bytes the tensors go into several files, with an index
    """
    fields = {**hugging_face(config), "bos_token_id": None, "eos_token_id": None, **(extra or {})}
    places = {key: (row, layer) for key, row, layer in _places(config)}
    _check_params(config, params)

    def parameter(key: str) -> tuple[Row, Any, np.dtype[Any]]:
        row, layer = places[key]
        whole = at(params, row.path)
        kind = kept_type(dtype, whole, layer is not None)
        whole = np.asarray(whole)  # JAX keeps what it fetched, so that is once per parameter
        return row, whole if layer is None else whole[layer], kind

    def make(key: str) -> np.ndarray:
        row, x, kind = parameter(key)
        return theirs(row, x).astype(kind)

    def size(key: str) -> int:
        _, x, kind = parameter(key)
        return int(x.size) * kind.itemsize

    with files.whole_folder(Path(folder)) as part:
        files.write(part, {key: size(key) for key in places}, make, shard_bytes)
        (part / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _check_params(config: ModelConfig, params: Params) -> None:
    given, needed = ({name: x.shape for name, x in named(tree).items()} for tree in (params, abstract_params(config)))
    wrong = [
        f"{name} is {given.get(name, 'absent')}, needed is {needed.get(name, 'none')}"
        for name in sorted(given | needed)
        if given.get(name) != needed.get(name)
    ]
    if wrong:
        raise ValueError(f"the parameters are not those of this configuration: {'; '.join(wrong[:8])}")


def list_keys(path: Path | str) -> str:
    """What a safetensors file or folder holds, a line for each key (one for layers that are alike), and how much it is."""
    held = files.stored(Path(path))
    lines = [f"{key}  {about}" for key, about in grouped([(key, str(x)) for key, x in _by_number(held)])]
    numbers = sum(int(np.prod(x.shape, dtype=np.int64)) for x in held.values())
    return "\n".join([*lines, f"{len(held)} tensors, {numbers:,} numbers"])


def _by_number(held: Mapping[str, Stored]) -> list[tuple[str, Stored]]:
    return sorted(held.items(), key=lambda item: (pattern(item[0])[0], pattern(item[0])[1] or 0))
