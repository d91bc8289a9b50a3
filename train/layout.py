"""Where everything of a run lies: the state's and the batch's shapes and shardings, known before anything is allocated."""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hola_jax import LanguageModel, ModelConfig
from hola_jax.array_types import Array
from hola_jax.config import memory_work, residual_group
from hola_jax.memory.kernels import Choice, Implementation, choose, depth_kernels, platform_of
from hola_jax.model import Params, weight_decay_mask
from train import optimizer
from train.shardings import TABLE, Specs, param_specs, placed

State = dict[str, Any]  # {"params", "optimizer": {"count", "mu", "nu"}, "step", "skipped"}
Batch = dict[
    str, Array
]  # {"tokens", "targets", "segment_ids", "mask"}, each [B, T]; the mask is what each target counts
INPUTS = {"tokens": np.int32, "targets": np.int32, "segment_ids": np.int32, "mask": np.uint8}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model's parameters, their optimizer and its batches, laid over a mesh."""

    model: ModelConfig
    mesh: Mesh

    @cached_property
    def choice(self) -> Choice:
        """What the mixer's memory runs by on this mesh's devices, which need not be there."""
        work = memory_work(self.model)
        if work is None:
            return Choice("xla", "a Transformer has no memory; jax.nn.dot_product_attention")
        sizes = self.mesh.shape
        axis = "sequence" if sizes["sequence"] > 1 else None
        platform = platform_of(self.mesh.devices.flat[0])
        work = work._replace(trained=True)
        return choose(self.model.implementation, work, axis, platform=platform, parts=sizes["tensor"])

    def over_depth(self, tokens: int) -> str:
        """By what readers over depth look at rows of so many tokens on each device, and why; empty where there are none."""
        if self.model.residual == "plain":
            return ""
        readers, dtype = 2 * residual_group(self.model), str(self.model.dtype)
        parts = self.mesh.shape["tensor"]
        run, why = depth_kernels(self.choice.name, readers, tokens, self.model.dim, dtype, parts)
        return f"readers over depth by {'xla' if run is None else 'kernels'}: {why}"

    @cached_property
    def abstract(self) -> LanguageModel:
        """The model with shapes for parameters, its memory's implementation chosen."""
        chosen = None if self.model.mixer == "transformer" else self.choice.name
        return self._abstract(self.model.implementation if chosen is None else chosen)

    @cached_property
    def abstract_by_xla(self) -> LanguageModel:
        """The same by plain XLA, which the compiler divides by itself."""
        return self._abstract("xla")

    def _abstract(self, implementation: Implementation | None) -> LanguageModel:
        model = dataclasses.replace(self.model, implementation=implementation)
        return nnx.eval_shape(lambda: LanguageModel(model))

    @cached_property
    def _specs(self) -> tuple[Specs, list[str]]:
        return param_specs(self.params, self.mesh)

    @property
    def params(self) -> Params:
        """Shapes of the parameters."""
        params: Params = nnx.to_pure_dict(nnx.split(self.abstract)[1])
        return params

    @property
    def specs(self) -> Specs:
        return self._specs[0]

    @property
    def undivided(self) -> list[str]:
        """A line for each dimension that the sharding table divides and this mesh cannot."""
        return self._specs[1]

    @property
    def decayed(self) -> Params:
        """Which parameters weight decay is for."""
        return weight_decay_mask(self.abstract)

    @property
    def state_shardings(self) -> State:
        """The optimizer's moments lie as their parameters."""
        whole, params = NamedSharding(self.mesh, P()), placed(self.specs, self.mesh)
        moments = {"count": whole, "mu": params, "nu": params}
        return {"params": params, "optimizer": moments, "step": whole, "skipped": whole}

    @property
    def batch_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, TABLE.tokens_bt)

    def init(self, seed: int) -> State:
        """The state before the first step; each device makes its own part, and any mesh makes the same numbers."""
        return jax.jit(partial(self._init, seed), out_shardings=self.state_shardings)()

    def _init(self, seed: int) -> State:
        params = nnx.to_pure_dict(nnx.state(LanguageModel(self.model, seed)))
        zero = jnp.zeros((), jnp.int32)
        return {"params": params, "optimizer": optimizer.init(params), "step": zero, "skipped": zero}

    def abstract_state(self) -> State:
        """Shapes, types and shardings of the state."""

        def placed_shape(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(placed_shape, jax.eval_shape(partial(self._init, 0)), self.state_shardings)

    def abstract_batch(self, rows: int, tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, types and shardings of a batch."""
        sharding = self.batch_sharding
        return {name: jax.ShapeDtypeStruct((rows, tokens), kind, sharding=sharding) for name, kind in INPUTS.items()}
