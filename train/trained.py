"""A model with its tokenizer, for those who use it: from a run's folder, or from a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

from hola_jax import LanguageModel
from hola_jax.config import DType
from train.data import config as sources
from train.data import shards, tokenizers
from train.data.tokenizers import Tokenizer
from train.weights import Saved, look


def trained(
    folder: str | Path, step: int | None = None, tokenizer: str | None = None
) -> tuple[LanguageModel, Tokenizer]:
    """(model, tokenizer) of a folder: of a run's last checkpoint, or that of `step`; or of a Hugging Face folder.

    tokenizer  its name or path, where the folder does not tell it or the data that the run names are not at hand
    """
    saved = look(folder, step)
    found = tokenizer_of(saved, tokenizer)
    return model_of(saved), found


def model_of(saved: Saved, dtype: DType | None = None) -> LanguageModel:
    """The model on one device; `dtype` is that of activations, None leaves it."""
    config = saved.config if dtype is None else dataclasses.replace(saved.config, dtype=dtype)
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config))), saved.params())


def tokenizer_of(saved: Saved, asked: str | None = None) -> Tokenizer:
    """The tokenizer whose numbers the model knows; one that is asked for must be that of the run."""
    if saved.about is None:
        return _beside(saved.folder) if asked is None else tokenizers.load(asked)
    made, source = saved.about["data"], saved.about["config"]["data"]
    found = _of_source(source) if asked is None else tokenizers.load(asked)
    if found is None:
        raise ValueError("the run was trained on numbers without a text; say which tokenizer with --tokenizer")
    if _is_text(source) and found.hash != made["hash"]:
        raise ValueError(
            f"the tokenizer {found.name} has the hash {found.hash[:12]}, and the run was made with {made['tokenizer']}, "
            f"hash {made['hash'][:12]}; give that one"
        )
    return found


def _beside(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json; say which tokenizer with --tokenizer")
    return tokenizers.load(str(file))


def _of_source(source: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of the data that a run's configuration names."""
    kind = source["kind"]
    if kind == sources.LibraryText.__name__:
        return tokenizers.load(source.get("tokenizer", "bytes"))  # earlier runs knew no other
    if kind == sources.TextFolder.__name__:
        return tokenizers.load(source["tokenizer"])
    if kind == sources.Records.__name__:
        root = Path(source["path"])
        if not root.is_dir():
            raise FileNotFoundError(f"the run's data, {root}, are not here; name their tokenizer with --tokenizer")
        made = shards.read_manifest(source["path"]).tokenizer
        return tokenizers.named(made.name, None if made.file is None else (root / made.file).read_bytes())
    if kind == sources.Facts.__name__:
        return _of_source(source["noise"]) if _is_text(source) else None
    if kind == sources.Mixture.__name__:
        return next((_of_source(part) for _, part in source["parts"] if _is_text(part)), None)
    return None


def _is_text(source: dict[str, Any]) -> bool:
    if source["kind"] == sources.Mixture.__name__:
        return any(_is_text(part) for _, part in source["parts"])
    return bool(source["kind"] != sources.Facts.__name__ or source["noise"] is not None)
