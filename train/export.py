"""`hola export`: a model as programs that run without this repository."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a model as StableHLO for CPU, CUDA and TPU, with its weights and a loader: `hola export FROM OUT`.

    FROM is the folder of a run of `hola train` or a Hugging Face folder. OUT/load.py runs what is in OUT with jax alone, and
    says how.
    """

    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FROM OUT")] = ()
    """The folder to read, and the folder to make."""
    rows: int = 1
    """Prompts that are read and continued together."""
    piece: int = 256
    """Tokens of each that one call of prefill reads; longer prompts go in as several."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the matrices, vectors being float32; unless given, that in which the model computes."""
    platforms: tuple[Literal["cpu", "cuda", "tpu"], ...] = ("cpu", "cuda", "tpu")
    """Where the programs are to run."""
    step: int | None = None
    """Of the run's checkpoint; unless given, the newest."""
    aliases: str | None = None
    """TOML or JSON that explains the names of a Hugging Face folder (docs/weights.md)."""

    def run(self) -> None:
        from hola_jax.inference.export import export
        from train.weights import load

        if len(self.paths) != 2:
            raise ValueError(f"hola export takes FROM and OUT; {len(self.paths)} names were given (--help explains)")
        source, out = map(Path, self.paths)
        config, params = load(source, step=self.step, aliases=self.aliases, put=np.asarray)
        sizes = export(
            out,
            config,
            params,
            rows=self.rows,
            piece=self.piece,
            dtype=self.dtype or config.dtype,
            platforms=self.platforms,
        )
        for name, size in sizes.items():
            print(f"{size / 1e6:12,.3f} MB  {out / name}")
