"""A prefix's memory as a safetensors file: written whole or not at all, read back only by the model that made it.

The header tells the format, the model's configuration, a fingerprint of its weights and how many tokens each row has read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from hola_jax.array_types import Array
from hola_jax.config import MemoryConfig, ModelConfig
from hola_jax.inference.prefix import Memory, Prefix, empty, width_of
from hola_jax.model import Params, named
from hola_jax.weights.files import whole_file, write_file

FORMAT = "hola_jax memory 1"
SPEED_ONLY = ("remat", "check", "implementation")  # fields of a model's configuration that change no memory


@jax.jit
def _sums(params: Params) -> Params:
    def total(x: Array) -> Array:
        kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
        bits = jax.lax.bitcast_convert_type(x, kinds[x.dtype.itemsize]).astype(jnp.uint32).reshape(-1)
        place = jnp.arange(bits.size, dtype=jnp.uint32)
        return jnp.sum((bits + jnp.uint32(1)) * (2 * place + 1), dtype=jnp.uint32)  # odd factors: order matters

    return jax.tree.map(total, params)


def digest(params: Params) -> str:
    """A fingerprint of parameters: of their names, shapes, types and numbers. It costs one pass over them."""
    found = jax.device_get(_sums(params))
    shapes = {path: (x.shape, str(x.dtype)) for path, x in named(params).items()}
    text = json.dumps([[path, *shapes[path], int(x)] for path, x in named(found).items()])
    return hashlib.sha256(text.encode()).hexdigest()


def meaning(config: ModelConfig) -> dict[str, Any]:
    """The configuration as plain values, without what changes only how fast a result comes."""
    config = dataclasses.replace(config, memory=config.memory.meaning())
    without = SPEED_ONLY if config.mixer == "transformer" else (*SPEED_ONLY, "max_length")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in without}


def save(path: Path, prefix: Prefix, config: ModelConfig, weights: str) -> int:
    """Writes a prefix; the file's size in bytes."""
    arrays = {name: np.asarray(x) for name, x in named(prefix.memory).items()}
    arrays = {name: np.ascontiguousarray(_cut(name, x, len(prefix))) for name, x in arrays.items()}
    about = {
        "format": FORMAT,
        "config": json.dumps(meaning(config)),
        "weights": weights,
        "positions": json.dumps(prefix.positions),
    }
    with whole_file(path) as part:
        write_file(part, arrays, about)
    return path.stat().st_size


def _cut(name: str, x: np.ndarray, batch: int) -> np.ndarray:
    return x[:, :batch] if name.startswith("state.") else x[:batch]


def load(path: Path, config: ModelConfig, weights: str, least_width: int = 1) -> Prefix:
    """The prefix of a file, for the model with this configuration and these weights."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no snapshot {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            positions = _check_header(path, about, config, weights)
            batch = len(positions)
            expected = jax.eval_shape(lambda: empty(config, batch))
            found = {}
            for name, x in named(expected).items():
                if name not in file.keys():  # noqa: SIM118 - the file is no dict
                    raise ValueError(f"the snapshot {path} has no {name}; it was written by another version")
                found[name] = file.get_tensor(name)
                if found[name].shape != x.shape or found[name].dtype != x.dtype:
                    shapes = f"{found[name].dtype}{list(found[name].shape)} instead of {x.dtype}{list(x.shape)}"
                    raise ValueError(f"the snapshot {path} holds {name} as {shapes}; it is damaged")
    except SafetensorError as error:
        raise ValueError(f"{path} is no snapshot, or a damaged one: {error}") from error
    if found["position"].tolist() != positions:
        raise ValueError(f"the snapshot {path} is damaged: its header and its memory tell different positions")
    structure = jax.tree.structure(expected)
    memory: Memory = jax.tree.unflatten(structure, [jnp.asarray(found[name]) for name in named(expected)])
    return Prefix(memory, batch) if batch == width_of(batch, least_width) else _widened(memory, batch, least_width)


def _widened(memory: Memory, batch: int, least_width: int) -> Prefix:
    return Prefix(memory, batch).rows(range(batch), least_width)


def _completed(kind: Any, theirs: Any, ours: dict[str, Any]) -> dict[str, Any]:
    """A header's fields, and at their defaults those that came later than it: they were never set."""
    if not isinstance(theirs, dict):
        raise ValueError(f"{theirs!r} in the place of a {kind.__name__}")
    later = [f for f in dataclasses.fields(kind) if f.name in ours and f.default is not dataclasses.MISSING]
    return {f.name: f.default for f in later} | theirs


def _check_header(path: Path, about: Mapping[str, str], config: ModelConfig, weights: str) -> list[int]:
    """The positions of a header that is this model's."""
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no snapshot of a memory that this version reads; its format is {about.get('format')!r}"
        )
    ours = json.loads(json.dumps(meaning(config)))
    try:
        theirs, positions = _completed(ModelConfig, json.loads(about["config"]), ours), json.loads(about["positions"])
        theirs["memory"] = _completed(MemoryConfig, theirs["memory"], ours["memory"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"the header of the snapshot {path} is damaged: {error!r}") from error
    if not isinstance(positions, list) or not positions or not all(isinstance(p, int) and p > 0 for p in positions):
        raise ValueError(f"the header of the snapshot {path} is damaged: its positions are {positions!r}")
    different = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    if different:
        lines = "; ".join(f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here" for name in different)
        raise ValueError(f"the snapshot {path} is of another model: {lines}")
    if about.get("weights") != weights:
        raise ValueError(f"the snapshot {path} is of a model with this configuration and other weights")
    return positions
