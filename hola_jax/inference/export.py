"""A model as programs that need no hola_jax: prefill and step as StableHLO for several platforms, weights beside them.

The folder that `export` writes has

    start.stablehlo      () -> state
    prefill.stablehlo    (params, tokens, documents, state) -> (logits of each row's last token, state), a piece at a time
    step.stablehlo       the same for one token
    model.safetensors    the parameters by their names here, such as blocks.mixer.query.kernel
    export.json          shapes and types, and the model's configuration
    load.py              hola_jax/inference/artifact.py: runs all this with jax alone

The programs are the portable StableHLO that jax.export makes, without the wrapping that only JAX reads. They take and give
dictionaries of arrays, so that a loader knows no class of ours, and they are those of the XLA path, which every platform
runs. Batch and length are fixed: prompts of any length go in as pieces, padded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export

from hola_jax.array_types import Array, Float, Int
from hola_jax.config import DType, ModelConfig
from hola_jax.inference import artifact
from hola_jax.model import LanguageModel, Params, init_state, named, state_bytes
from hola_jax.weights.files import whole_folder, write_file
from hola_jax.weights.tables import abstract_params, cast

PLATFORMS = ("cpu", "cuda", "tpu")
FIELDS = ("calling_convention_version", "module_kept_var_idx", "uses_global_constants")  # of jax.export.Exported
Flat = dict[str, Any]  # of arrays


def export(
    folder: Path | str,
    config: ModelConfig,
    params: Params,
    *,
    rows: int = 1,
    piece: int = 256,
    dtype: DType | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> dict[str, int]:
    """Writes the folder, all of it or nothing; bytes of each file.

    rows       prompts that are read and continued together
    piece      tokens of each that one call of prefill reads
    dtype      of the matrices; vectors are float32. None leaves every parameter the type that it has
    platforms  that the programs are lowered for
    """
    for name, value in (("rows", rows), ("piece", piece)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
    if piece < 2:
        raise ValueError("piece is 1; prefill reads at least 2 tokens at a time, step reads one")
    if unknown := set(platforms) - set(PLATFORMS):
        raise ValueError(f"platforms has {', '.join(sorted(unknown))}; it may have {', '.join(PLATFORMS)}")
    # The XLA path is the one that every platform has; checks and rematerialisation have no part in a program of this kind.
    config = dataclasses.replace(config, implementation="xla", check=False, remat="none")
    weights = {name: np.asarray(x) for name, x in named(cast(params, dtype)).items()}
    programs = lowered(config, {name: (x.shape, x.dtype) for name, x in weights.items()}, rows, piece, platforms)
    state = jax.eval_shape(lambda: init_state(config, rows))
    about = {
        "rows": rows,
        "piece": piece,
        "vocab_size": config.vocab_size,
        "state": {name: [str(x.dtype), list(x.shape)] for name, x in named(state).items()},
        "programs": {name: {field: getattr(program, field) for field in FIELDS} for name, program in programs.items()},
        "platforms": list(platforms),
        "state_bytes": state_bytes(config, rows),
        "jax": jax.__version__,
        "model": dataclasses.asdict(config),
    }
    with whole_folder(Path(folder)) as part:
        for name, program in programs.items():
            (part / f"{name}.stablehlo").write_bytes(program.mlir_module_serialized)
        write_file(part / "model.safetensors", {name: np.ascontiguousarray(x) for name, x in weights.items()})
        (part / "export.json").write_text(json.dumps(about, indent=2) + "\n")
        (part / "load.py").write_text(Path(artifact.__file__).read_text())
        return {file.name: file.stat().st_size for file in sorted(part.iterdir())}


def lowered(
    config: ModelConfig,
    weights: dict[str, tuple[tuple[int, ...], Any]],
    rows: int,
    piece: int,
    platforms: Sequence[str] = PLATFORMS,
) -> dict[str, jax_export.Exported]:
    """{"start", "prefill", "step"}: programs on dictionaries of arrays; `weights` has shape and type by name."""
    structure = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config)))
    state_tree = jax.tree.structure(jax.eval_shape(lambda: init_state(config, rows)))
    params_tree = jax.tree.structure(abstract_params(config))
    names = list(named(abstract_params(config)))
    if sorted(names) != sorted(weights):
        wrong = ", ".join(sorted(set(names) ^ set(weights))[:8])
        raise ValueError(f"the parameters are not those of this configuration: {wrong}")

    def start() -> Flat:
        return named(init_state(config, rows))

    def run(
        params: Flat, tokens: Int[Array, "B T"], documents: Int[Array, "B T"], state: Flat
    ) -> tuple[Float[Array, "B E"], Flat]:
        model = nnx.merge(structure, jax.tree.unflatten(params_tree, [params[name] for name in names]))
        before = jax.tree.unflatten(state_tree, [state[name] for name in state_names])
        hidden, after = model.hidden(tokens, documents, before)
        place = jnp.where(documents > 0, jnp.arange(tokens.shape[1]), 0)
        last = jnp.take_along_axis(hidden, jnp.max(place, axis=1)[:, None, None], axis=1)[:, 0]
        return model.head(last), named(after)

    empty = named(jax.eval_shape(lambda: init_state(config, rows)))
    state_names = list(empty)
    params = {name: jax.ShapeDtypeStruct(shape, kind) for name, (shape, kind) in weights.items()}

    def at_length(tokens: int) -> jax_export.Exported:
        ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
        return jax_export.export(jax.jit(run), platforms=list(platforms))(params, ids, ids, empty)

    begun = jax_export.export(jax.jit(start), platforms=list(platforms))()
    return {"start": begun, "prefill": at_length(piece), "step": at_length(1)}
