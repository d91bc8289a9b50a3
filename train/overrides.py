"""From a Python file and `--optimizer.peak=1e-3` to a configuration; what is unknown or ill typed is named."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import runpy
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from train.config import TrainConfig, as_dict, flat
from train.data.config import Mixture, Part

T = TypeVar("T")


def load(path: str) -> TrainConfig:
    """The `config` of a Python file, or the one that a run folder was made with."""
    if Path(path).is_dir():
        return _of_folder(Path(path))
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no configuration file or run folder {path}; configs/demo.py is a file")
    config = runpy.run_path(path).get("config")
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{path} defines no `config = TrainConfig(...)`; see configs/demo.py")
    return config


def _of_folder(folder: Path) -> TrainConfig:
    written = folder / "config.json"
    if not written.is_file():
        raise FileNotFoundError(f"{folder} is no run folder, it has no config.json; name a configuration file instead")
    values = json.loads(written.read_text())["config"]
    config: TrainConfig = from_dict(TrainConfig, {**values, "run": str(folder)})
    return config


def from_dict(kind: Any, values: dict[str, Any]) -> Any:
    """What `as_dict` wrote, as the dataclass `kind` again; a setting that it no longer has is named."""
    hints = get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{kind.__name__} has no setting {', '.join(unknown)}; was it written by another version?")
    return kind(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(kind: Any, value: Any) -> Any:
    if isinstance(value, dict):
        if "kind" not in value:
            return from_dict(kind, value)
        source = {each.__name__: each for each in (*get_args(Part), Mixture)}[value["kind"]]
        return from_dict(source, {name: x for name, x in value.items() if name != "kind"})
    return tuple(_value(None, each) for each in value) if isinstance(value, list) else value


def pairs(arguments: list[str]) -> list[tuple[str, str]]:
    """(name, value) of `--name=value` and `--name value`."""
    found, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ValueError(f"{word!r} is no override; write --name=value, such as --optimizer.peak=1e-3")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ValueError(f"--{name} has no value; write --{name}=value")
            value = rest.pop(0)
        found.append((name.replace("-", "_"), value))
    return found


def override(config: T, name: str, text: str, whole: Any = None, prefix: str = "") -> T:
    """`config` with the field called `name`, dots and all, of the value that `text` spells."""
    whole = config if whole is None else whole
    head, _, tail = name.partition(".")
    fields = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    if head not in fields:
        raise ValueError(_unknown(prefix + name, whole))
    value = getattr(config, head)
    if tail:
        if not dataclasses.is_dataclass(value):
            raise ValueError(_unknown(prefix + name, whole))
        new = override(value, tail, text, whole, f"{prefix}{head}.")
    elif dataclasses.is_dataclass(value):
        names = ", ".join(f"--{prefix}{head}.{field.name}" for field in dataclasses.fields(value))
        hint = (
            f"set one of them: {names}" if names else "it has none to set; another kind is another configuration file"
        )
        raise ValueError(f"--{prefix}{head} is a group of settings, {type(value).__name__}; {hint}")
    else:
        new = parsed(text, get_type_hints(type(config))[head], f"--{prefix}{head}")
    return dataclasses.replace(config, **{head: new})  # type: ignore[type-var]


def _unknown(name: str, config: Any) -> str:
    names = list(flat(as_dict(config)))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    last = name.rpartition(".")[2]
    near = near or [known for known in names if known.rpartition(".")[2] == last]
    hint = f"did you mean --{near[0]}?" if near else "`hola train CONFIG --help` lists all"
    return f"--{name} is no setting of this configuration; {hint}"


def parsed(text: str, kind: Any, name: str) -> Any:
    """The value of type `kind` that `text` spells."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if type(None) in get_args(kind) and text.lower() == "none":
            return None
        kinds = [each for each in get_args(kind) if each is not type(None)]
        return parsed(text, kinds[0], name)
    if origin is Literal:
        if text not in get_args(kind):
            near = difflib.get_close_matches(text, [str(each) for each in get_args(kind)], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} is {text!r}; it must be one of {', '.join(map(str, get_args(kind)))}{hint}")
        return text
    if origin is tuple:
        return tuple(parsed(part, get_args(kind)[0], name) for part in text.split(",") if part)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} is {text!r}; it must be true or false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text.replace("_", "")) if kind is float or "e" not in text else _whole(text)
        except ValueError:
            what = "an integer" if kind is int else "a number"
            raise ValueError(f"{name} is {text!r}; it must be {what}") from None
    return text if kind is str else ast.literal_eval(text)


def _whole(text: str) -> int:
    value = float(text)
    if not value.is_integer():
        raise ValueError(text)
    return int(value)


def resolve(path: str, arguments: list[str]) -> TrainConfig:
    """The configuration of a file with the overrides of a command line."""
    config = load(path)
    for name, value in pairs(arguments):
        config = override(config, name, value)
    return config
