"""Models and runs: a configuration with parameters from where they lie, and a run that starts from them.

They lie in a run's checkpoint, of any mesh, or in a Hugging Face folder. Reading takes the host's memory for the parameters
alone: no device of the mesh that wrote them, no optimizer. It changes nothing in the run's folder, which may be training.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
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


def is_run(folder: Path) -> bool:
    """Whether a run wrote the folder."""
    return (folder / "checkpoints").is_dir()


def load(
    folder: Path | str,
    *,
    step: int | None = None,
    aliases: str | None = None,
    dtype: DType | None = "float32",
    put: Put = jax.device_put,
) -> tuple[ModelConfig, Params]:
    """(configuration, parameters) of a run's folder or of a Hugging Face folder.

    step     of a run's checkpoint; None takes the newest
    aliases  other names of a Hugging Face folder; see `hola_jax.weights.load`, also for `dtype` and `put`
    """
    folder = Path(folder)
    if is_run(folder):
        if aliases is not None:
            raise ValueError(f"{folder} is a run's folder, whose names need no aliases")
        config, params, _ = load_run(folder, step)
        return config, jax.tree.map(put, cast(params, dtype))
    if step is not None:
        raise ValueError(f"{folder} is no run's folder, it has no checkpoints, so --step={step} means nothing")
    return weights.load(folder, aliases=aliases, dtype=dtype, put=put)


def load_run(folder: Path, step: int | None = None) -> tuple[ModelConfig, Params, About]:
    """(configuration, parameters as NumPy arrays, what the checkpoint says of itself)."""
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    with ocp.CheckpointManager(
        folder.absolute() / "checkpoints", options=options, item_names=("state", "about")
    ) as found:
        steps = sorted(found.all_steps())
        if not steps:
            raise FileNotFoundError(f"{folder} has no complete checkpoint yet")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(f"{folder} has no checkpoint of step {step}; it has those of {', '.join(map(str, steps))}")
        about: About = found.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
    config: ModelConfig = from_dict(ModelConfig, about["config"]["model"])
    params = _params(folder.absolute() / "checkpoints" / str(step) / "state", config)
    sums = bit_sums({"params": params})
    wrong = sorted(name for name, total in sums.items() if total != about["sums"].get(name))
    if wrong:
        raise ValueError(
            f"the numbers of {', '.join(wrong[:3])} in the checkpoint of step {step} are not those that were saved; "
            f"another step of {steps} may be intact"
        )
    return config, params, about


def _params(state: Path, config: ModelConfig) -> Params:
    wanted = {"params": abstract_params(config)}
    as_numpy = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), wanted)
    with ocp.PyTreeCheckpointer() as reader:
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        params: Params = reader.restore(state, args=args)["params"]
    return params


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
