"""Runs an exported model with jax alone. `hola export` writes this file, as load.py, beside the model.

    from load import Model

    model = Model("FOLDER")
    logits, state = model.read([[1, 5, 3], [7]])       # prompts, one for each row; state: the memory, of constant size
    for _ in range(8):
        tokens = logits.argmax(-1)[:, None]            # [rows, 1]
        logits, state = model.step(tokens, state)

Nothing of hola_jax is imported here, and nothing is unpickled: programs are StableHLO, weights are safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import export

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16)}
LARGEST_HEADER = 10**8


class Model:
    """An exported model, on the first device of `platform` or on JAX's default device.

    A memory, called state, is a dictionary of arrays; every call takes one and gives another, and changes none.
    """

    def __init__(self, folder: Path | str, platform: str | None = None) -> None:
        folder = Path(folder)
        self.about: dict[str, Any] = json.loads((folder / "export.json").read_text())
        self.rows: int = self.about["rows"]
        self.piece: int = self.about["piece"]
        self.vocabulary: int = self.about["vocab_size"]
        self.device = jax.devices(platform)[0]
        here = {"gpu": "cuda"}.get(self.device.platform, self.device.platform)
        if here not in self.about["platforms"]:
            raise ValueError(f"{folder} was exported for {', '.join(self.about['platforms'])}, and this is {here}")
        weights = tensors(folder / "model.safetensors")
        start, prefill, step = programs(folder, self.about, weights)
        self._start, self._prefill, self._step = jax.jit(start.call), jax.jit(prefill.call), jax.jit(step.call)
        self._params = {name: jax.device_put(x, self.device) for name, x in weights.items()}

    def start(self) -> dict[str, jax.Array]:
        """The memory of an empty prefix, for every row."""
        with jax.default_device(self.device):
            state: dict[str, jax.Array] = self._start()
        return state

    def prefill(
        self, tokens: Any, documents: Any, state: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """A piece: tokens and documents [rows, piece] -> (logits [rows, vocabulary] of each row's last real token, state).

        documents: 1 for a token, 0 for padding, which changes nothing wherever it stands; a larger number than before
        begins a new document, which sees none of the earlier ones. Logits of a row without a real token mean nothing.
        """
        self._check(tokens, documents, self.piece)
        return self._prefill(self._params, np.asarray(tokens, np.int32), np.asarray(documents, np.int32), state)

    def step(
        self, tokens: Any, state: dict[str, jax.Array], documents: Any = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One token for each row, [rows, 1]; a row whose `documents` is 0 stays as it is."""
        documents = np.ones((self.rows, 1), np.int32) if documents is None else documents
        self._check(tokens, documents, 1)
        return self._step(self._params, np.asarray(tokens, np.int32), np.asarray(documents, np.int32), state)

    def _check(self, tokens: Any, documents: Any, length: int) -> None:
        for name, x in (("tokens", tokens), ("documents", documents)):
            if np.shape(x) != (self.rows, length):
                raise ValueError(f"{name} has shape {np.shape(x)}; this export takes {(self.rows, length)}")

    def read(
        self, prompts: Sequence[Sequence[int]], state: dict[str, jax.Array] | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Prompts of any lengths, one for each row, piece by piece: (logits after the last token of each, state)."""
        if len(prompts) != self.rows:
            raise ValueError(f"{len(prompts)} prompts; this export takes {self.rows}")
        for prompt in prompts:
            if len(prompt) < 1 or min(prompt) < 0 or max(prompt) >= self.vocabulary:
                raise ValueError(f"a prompt needs at least one token, each from 0 to {self.vocabulary - 1}")
        state = self.start() if state is None else state
        logits: Any = None
        for begin in range(0, max(map(len, prompts)), self.piece):
            tokens, documents = np.zeros((2, self.rows, self.piece), np.int32)
            for row, prompt in enumerate(prompts):
                part = prompt[begin : begin + self.piece]
                tokens[row, : len(part)], documents[row, : len(part)] = part, 1
            found, state = self.prefill(tokens, documents, state)
            logits = found if logits is None else jnp.where(documents.sum(axis=1, keepdims=True) > 0, found, logits)
        return logits, state


def programs(folder: Path, about: dict[str, Any], weights: dict[str, np.ndarray]) -> list[export.Exported]:
    """start, prefill and step.

    The files hold StableHLO and nothing else, since JAX's own wrapping of it needs one more package to be read. What it
    would say besides, shapes and types, is in export.json; a stand-in of the same shapes is exported here and now, by
    whichever JAX this is, and given the program of the file.
    """

    def shaped(kind: str, shape: Sequence[int]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(kind))

    rows = about["rows"]
    state = {name: shaped(*said) for name, said in about["state"].items()}
    params = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    ids = {name: shaped("int32", (rows, length)) for name, length in (("prefill", about["piece"]), ("step", 1))}
    answer = (shaped("float32", (rows, about["vocab_size"])), state)
    found = []
    for name in ("start", "prefill", "step"):
        given, result = ((), state) if name == "start" else ((params, ids[name], ids[name], state), answer)

        def stand_in(*_: Any, result: Any = result) -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)

        shell = export.export(jax.jit(stand_in), platforms=about["platforms"])(*given)
        said = dict(about["programs"][name])
        said["module_kept_var_idx"] = tuple(said["module_kept_var_idx"])
        program = (folder / f"{name}.stablehlo").read_bytes()
        found.append(dataclasses.replace(shell, mlir_module_serialized=program, **said))
    return found


def tensors(file: Path | str) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped from the disk; the header is checked against the file before any is."""
    size = Path(file).stat().st_size
    with open(file, "rb") as opened:
        first = opened.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > min(size - 8, LARGEST_HEADER):
            raise ValueError(f"{file} is cut short, or no safetensors file: its header ends beyond the file")
        try:
            header = json.loads(opened.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            spans = {name: tuple(map(int, entry["data_offsets"])) for name, entry in entries.items()}
            shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
            kinds = {name: DTYPES[entry["dtype"]] for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} has a damaged header ({type(error).__name__}: {error})") from error
    end = 0
    for name in sorted(spans, key=lambda name: spans[name]):
        start, stop = spans[name]
        count = int(np.prod(np.array(shapes[name], object), initial=1))
        if start != end or min(shapes[name], default=0) < 0 or stop - start != count * kinds[name].itemsize:
            raise ValueError(f"{file} has a damaged header: {name} does not fit its place")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"{file} has {size} bytes, and its header tells of {8 + length + end}; it is cut short")
    data = np.memmap(file, np.uint8, "r", offset=8 + length) if end else np.zeros(0, np.uint8)
    return {name: data[slice(*spans[name])].view(kinds[name]).reshape(shapes[name]) for name in entries}
