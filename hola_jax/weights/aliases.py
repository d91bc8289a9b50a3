"""A small file of the user's that says what a folder with other names means: other keys, and fields of config.json.

    [keys]                # a key of the folder = the key of our tables, or "ignore"; {i} is the number of the layer
    "model.layers.{i}.attn.mem.gain_q" = "model.layers.{i}.attn.cache_q_norm.weight"
    "model.layers.{i}.attn.rotary.inv_freq" = "ignore"
    [config]              # fields that config.json lacks or names otherwise
    model_type = "hola"
    cache_window = 64

TOML as above, or JSON with the same two objects.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from hola_jax.config import unknown_name
from hola_jax.weights.files import read_json
from hola_jax.weights.tables import known_keys

IGNORE = "ignore"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Aliases(NamedTuple):
    """What the file says."""

    keys: dict[str, str]
    config: dict[str, Any]


def read_aliases(file: Path | str | None) -> Aliases:
    """The aliases of a TOML or JSON file; those of no file are empty."""
    if file is None:
        return Aliases({}, {})
    file = Path(file)
    values = _toml(file) if file.suffix == ".toml" else read_json(file)
    for name, part in values.items():
        if name not in Aliases._fields:
            raise unknown_name(f"a table of {file}", name, Aliases._fields)
        if not isinstance(part, dict):
            raise ValueError(f"{name} of {file} is {part!r}; it must be a table")
    aliases = Aliases(values.get("keys", {}), values.get("config", {}))
    known = known_keys() | {IGNORE}
    for key, meaning in aliases.keys.items():
        if meaning not in known:
            raise unknown_name(f"what {file} gives for {key!r}", meaning, sorted(known))
        if meaning != IGNORE and ("{i}" in key) != ("{i}" in meaning):
            raise ValueError(f"{file} gives {meaning!r} for {key!r}; both must have {{i}}, or neither")
    return aliases


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is no TOML: {error}") from error


def pattern(key: str) -> tuple[str, int | None]:
    """("model.layers.{i}.attn.A_log", 7) of "model.layers.7.attn.A_log"; None for what belongs to no layer."""
    found = _NUMBER.search(key)
    if found is None:
        return key, None
    return key[: found.start()] + "{i}" + key[found.end() :], int(found.group())


def renamed(keys: Iterable[str], aliases: Aliases) -> dict[str, str]:
    """{key in our tables' names: key in the file}, without what is to be ignored."""
    found: dict[str, str] = {}
    unused = set(aliases.keys)
    for key in keys:
        general, number = pattern(key)
        unused.discard(general)
        name = aliases.keys.get(general, general)
        if name == IGNORE:
            continue
        name = name if number is None else name.replace("{i}", str(number))
        if name in found:
            raise ValueError(f"{found[name]} and {key} both mean {name}; an alias is wrong")
        found[name] = key
    if unused:
        raise ValueError(f"the aliases name keys that are not there: {', '.join(sorted(unused))}")
    return found
