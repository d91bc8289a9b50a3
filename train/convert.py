"""`hola convert`: a run's checkpoint to a Hugging Face folder, such a folder to a run, or one such folder to another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from hola_jax import ModelConfig, weights
from hola_jax.config import parameter_count
from hola_jax.model import Params
from train.overrides import load as load_recipe
from train.overrides import override, pairs


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert weights from and to Hugging Face folders: `hola convert FROM OUT`.

    Or say what a file or folder holds: `hola convert --list-keys PATH`. FROM is the folder of a run of
    `hola train`, or a Hugging Face folder (config.json and safetensors) of a Gated DeltaNet, a Transformer or a HOLA in
    flash-linear-attention's layout. OUT becomes such a folder, or with --recipe a run's folder that `hola train OUT` starts
    from, with its first step still to do.
    """

    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FROM OUT")] = ()
    """The folder to read, and the folder to make."""
    list_keys: str | None = None
    """Print what a safetensors file or folder holds, and do nothing else."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the matrices that are written, vectors being float32; unless given, every number keeps its type."""
    step: int | None = None
    """Of the run's checkpoint; unless given, the newest."""
    aliases: str | None = None
    """TOML or JSON that explains the names of FROM where they are not ours (docs/weights.md)."""
    recipe: str | None = None
    """Configuration of the run that OUT becomes, such as configs/text_folder.py; its model gives way to FROM's."""
    settings: tuple[str, ...] = ()
    """Changes to the recipe, such as --settings data.path=TEXTS steps=2000."""

    def run(self) -> None:
        if self.list_keys is not None:
            if self.paths:
                raise ValueError(f"--list-keys stands alone, and {' '.join(self.paths)} was given too")
            print(weights.list_keys(self.list_keys))
            return
        if len(self.paths) != 2:
            raise ValueError(f"hola convert takes FROM and OUT; {len(self.paths)} names were given (--help explains)")
        if self.settings and self.recipe is None:
            raise ValueError("--settings changes a --recipe, and none was given")
        source, out = map(Path, self.paths)
        if self.recipe is not None:
            self._to_run(source, out)
        else:
            self._to_folder(source, out)

    def _to_folder(self, source: Path, out: Path) -> None:
        from train.weights import load

        # Types as they are stored, so that nothing changes that was not asked for.
        config, params = load(source, step=self.step, aliases=self.aliases, dtype=None, put=np.asarray)
        weights.save(out, config, params, dtype=self.dtype)
        self._say(config, params, out)

    def _to_run(self, source: Path, out: Path) -> None:
        from train.weights import is_run, load, start_run

        if self.dtype is not None:
            raise ValueError("--dtype is for a Hugging Face folder; a run's parameters are float32")
        if is_run(source):
            raise ValueError(f"{source} is a run's folder already; `hola train {source}` goes on with it")
        config, params = load(source, aliases=self.aliases, put=np.asarray)
        recipe = load_recipe(str(self.recipe))
        for name, value in pairs([f"--{setting}" for setting in self.settings]):
            recipe = override(recipe, name, value)
        start_run(dataclasses.replace(recipe, run=str(out), model=trained_like(recipe.model, config)), params)
        self._say(config, params, out)

    def _say(self, config: ModelConfig, params: Params, out: Path) -> None:
        numbers, size = parameter_count(config)["total"], sum(x.nbytes for x in jax.tree.leaves(params))
        print(f"{config.mixer}: {numbers:,} parameters ({size / 1e6:,.1f} MB as read) are in {out}")


def trained_like(recipe: ModelConfig, model: ModelConfig) -> ModelConfig:
    """The model, computed as the recipe says: what has no say in its meaning."""
    how = {name: getattr(recipe, name) for name in ("remat", "check", "implementation")}
    return dataclasses.replace(model, **how)
