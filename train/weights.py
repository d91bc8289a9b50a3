"""Models and runs: a configuration with parameters from where they lie, and a run that starts from them.

They lie in a run's checkpoint, of any mesh, or in a Hugging Face folder. Reading takes the host's memory for the parameters
alone: no device of the mesh that wrote them, no optimizer. It changes nothing in the run's folder, which may be training.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import hola_jax
from hola_jax import ModelConfig, weights
from hola_jax.config import DType
from hola_jax.model import Params
from hola_jax.weights.files import whole_folder
from hola_jax.weights.tables import abstract_params, cast
from train import config as configuration
from train import optimizer
from train.checkpoint import About, Checkpoints, bit_sums, shapes
from train.config import TrainConfig
from train.feed import Data
from train.layout import Layout
from train.mesh import MeshConfig, make_mesh
from train.overrides import from_dict

Put = Callable[[np.ndarray], Any]
CHECKPOINTS = "checkpoints"  # the folder of a run that holds them


@dataclasses.dataclass(frozen=True)
class Saved:
    """A model in a folder: what it is, its numbers not read yet."""

    folder: Path
    config: ModelConfig
    step: int | None = None  # of a run's checkpoint
    about: About | None = None  # what that says of itself
    aliases: str | None = None  # of a Hugging Face folder

    def params(self, dtype: DType | None = "float32", put: Put = jax.device_put) -> Params:
        """Its numbers; see `hola_jax.weights.load`."""
        if self.about is None:
            return weights.load(self.folder, aliases=self.aliases, dtype=dtype, put=put)[1]
        found: Params = jax.tree.map(put, cast(_of_checkpoint(self), dtype))
        return found


def is_run(folder: Path) -> bool:
    """Whether a run wrote the folder."""
    return (folder / CHECKPOINTS).is_dir()


def look(folder: Path | str, step: int | None = None, aliases: str | None = None) -> Saved:
    """The model in a run's folder or in a Hugging Face folder.

    step     of a run's checkpoint; None takes the newest
    aliases  a file that explains other names in a Hugging Face folder (`hola_jax.weights.aliases`)
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}{_nearest(path)}")
    if is_run(path):
        if aliases is not None:
            raise ValueError(f"{folder} is a run's folder, whose names need no aliases")
        return _look_at_run(path, step)
    if step is not None:
        raise ValueError(f"{folder} is no run's folder, it has no checkpoints, so --step={step} means nothing")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no run folder, it has no checkpoints, and no Hugging Face folder, it has no config.json"
        )
    return Saved(path, weights.configuration(path, aliases=aliases), aliases=aliases)


def load(
    folder: Path | str,
    *,
    step: int | None = None,
    aliases: str | None = None,
    dtype: DType | None = "float32",
    put: Put = jax.device_put,
) -> tuple[ModelConfig, Params]:
    """(configuration, parameters) of a run's folder or of a Hugging Face folder; see `look` and `hola_jax.weights.load`."""
    saved = look(folder, step, aliases)
    return saved.config, saved.params(dtype, put)


def _nearest(path: Path) -> str:
    names = [each.name for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _look_at_run(folder: Path, step: int | None) -> Saved:
    place = folder.absolute() / CHECKPOINTS
    steps = sorted(ocp.utils.checkpoint_steps(place))  # those that are complete
    if not steps:
        raise FileNotFoundError(f"{folder} has no complete checkpoint yet; let `hola train` save one")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(f"{folder} has no checkpoint of step {step}; it has those of {', '.join(map(str, steps))}")
    with _readable(folder, step), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        about: About = reader.restore(place / str(step) / "about", args=ocp.args.JsonRestore())
    return Saved(folder, from_dict(ModelConfig, about["config"]["model"]), step, about)


def _of_checkpoint(saved: Saved) -> Params:
    """The parameters alone, as NumPy arrays, whatever mesh they were saved from."""
    assert saved.about is not None and saved.step is not None
    wanted = {"params": abstract_params(saved.config)}
    as_numpy = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    state = saved.folder.absolute() / CHECKPOINTS / str(saved.step) / "state"
    with _readable(saved.folder, saved.step), ocp.PyTreeCheckpointer() as reader:
        params: Params = reader.restore(state, args=args)["params"]
    sums = saved.about["sums"]
    wrong = sorted(name for name, total in bit_sums({"params": params}).items() if total != sums.get(name))
    if wrong:
        raise ValueError(
            f"the checkpoint of step {saved.step} in {saved.folder} is damaged: the numbers of {', '.join(wrong[:3])} are "
            "not those that were saved; --step takes another"
        )
    return params


@contextmanager
def _readable(folder: Path, step: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a damaged file makes the readers raise
        line = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            f"the checkpoint of step {step} in {folder} cannot be read ({type(error).__name__}: {line}); "
            "--step takes another"
        ) from error


def start_run(config: TrainConfig, params: Params, data: Data | None = None) -> None:
    """Makes the run's folder, with a checkpoint of step 0 that has these parameters."""
    loader: Any = importlib.import_module("train.data.loader") if data is None else data
    out = Path(config.run)
    layout = Layout(config.model, make_mesh(MeshConfig(), jax.devices()[:1]))
    zero = np.zeros((), np.int32)
    state = {"params": params, "optimizer": optimizer.init(params), "step": zero, "skipped": zero}
    state = jax.tree.map(jax.device_put, state, layout.state_shardings)
    about = {
        "step": 0,
        "position": 0,
        "seed": config.seed,
        "config": configuration.as_dict(config),
        "data": loader.identity(config.data),
        "shapes": shapes(layout),
    }
    said: list[str] = []
    with whole_folder(out) as part:
        checkpoints = Checkpoints(part, config.checkpoint, said.append)
        checkpoints.save(0, state, about)
        checkpoints.close()
        if checkpoints.failed:
            raise OSError(said[-1])
        versions = {"jax": jax.__version__, "hola_jax": hola_jax.__version__}
        configuration.write(config, part, ["hola", "train", config.run], versions)
