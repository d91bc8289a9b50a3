"""What a run folder holds for those who use the model: its parameters, from a checkpoint of any mesh, and its tokenizer.

The folder is only read; a damaged checkpoint is an error here, and stays where it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from hola_jax import LanguageModel, ModelConfig
from train.checkpoint import bit_sums
from train.data import config as sources
from train.data import shards, tokenizers
from train.data.tokenizers import Tokenizer
from train.overrides import from_dict


def trained(run: str | Path, step: int | None = None, tokenizer: str | None = None) -> tuple[LanguageModel, Tokenizer]:
    """(model, tokenizer) of a run folder: of its last checkpoint, or that of `step`.

    tokenizer  its name or path, where the data that the run names is not at hand; it must be the one of the run
    """
    folder = Path(run).absolute()
    if not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(f"{run} is no run folder, it has no checkpoints; `hola train` makes one")
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder / "checkpoints", options=options, item_names=("state", "about")) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise FileNotFoundError(f"{run} has no checkpoint yet")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(f"{run} has no checkpoint of step {step}; it has those of {', '.join(map(str, steps))}")
        about = _read(run, step, lambda: manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())))
        about = about["about"]
        config: ModelConfig = from_dict(ModelConfig, about["config"]["model"])
        abstract = nnx.eval_shape(lambda: LanguageModel(config))
        structure, shapes = nnx.split(abstract)
        params = _read(run, step, lambda: _params(manager, step, nnx.to_pure_dict(shapes)))
    wrong = [name for name, found in bit_sums({"params": params}).items() if found != about["sums"].get(name)]
    if wrong:
        raise ValueError(f"the checkpoint of step {step} in {run} is damaged: {wrong[0]} is not what was saved")
    return nnx.merge(structure, params), _tokenizer(about, tokenizer)


def _read(run: str | Path, step: int, action: Any) -> Any:
    try:
        return action()
    except Exception as error:  # whatever a damaged file makes the readers raise
        line = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            f"the checkpoint of step {step} in {run} cannot be read ({type(error).__name__}: {line})"
        ) from error


def _params(manager: ocp.CheckpointManager, step: int, shapes: Any) -> Any:
    """The parameters alone, on one device, whatever mesh they were saved from."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)}
    placed = ocp.checkpoint_utils.construct_restore_args(wanted)
    arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=placed, partial_restore=True)
    return manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]["params"]


def _tokenizer(about: dict[str, Any], asked: str | None) -> Tokenizer:
    made = about["data"]
    found = tokenizers.load(asked) if asked is not None else _of_source(about["config"]["data"])
    if found is None:
        raise ValueError(f"the data of this run ({made['tokenizer']}) are no text; its model takes tokens alone")
    if found.hash != made["hash"]:
        raise ValueError(
            f"the tokenizer {found.name} has the hash {found.hash[:12]}, and the run was made with {made['tokenizer']}, "
            f"hash {made['hash'][:12]}; give that one"
        )
    return found


def _of_source(source: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of the data that a run's configuration names."""
    kind = source["kind"]
    if kind == sources.LibraryText.__name__:
        return tokenizers.load("bytes")
    if kind == sources.TextFolder.__name__:
        return tokenizers.load(source["tokenizer"])
    if kind == sources.Records.__name__:
        root = Path(source["path"])
        if not root.is_dir():
            raise FileNotFoundError(f"the run's data, {root}, are not here; name their tokenizer with --tokenizer")
        made = shards.read_manifest(source["path"]).tokenizer
        return tokenizers.named(made.name, None if made.file is None else (root / made.file).read_bytes())
    if kind == sources.Mixture.__name__:
        found = (_of_source(part) for _, part in source["parts"])
        return next((tokenizer for tokenizer in found if tokenizer is not None), None)
    return None
