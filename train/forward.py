"""The model over a mesh: sums of the loss over a batch, and their gradient.

Both run in shard_map by hand along data, fsdp and sequence. A layer's parameters are gathered when the layer runs, the
gradient goes back by the transpose of that, and it is summed over the devices once per step, after all microbatches. Left to
the compiler, the memory's gathers by row would bring every row to every device. Along tensor the compiler divides, and
kernels, which it cannot divide, go by heads (hola_jax.memory.kernels).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hola_jax.array_types import Array
from hola_jax.losses import LossSums, chunked_loss
from hola_jax.model import Params
from train.layout import Batch, Layout
from train.shardings import MANUAL, TABLE, by_hand, gatherer, of_one_layer, summed

SUMS: Any = LossSums(*[P()] * 3)  # type: ignore[arg-type]


def mapped(layout: Layout, body: Callable[..., Any], out_specs: Any, in_specs: Any = None) -> Callable[..., Any]:
    """`body(params, batch)` of each device's part, over the mesh."""
    axes = {*MANUAL, "tensor"} if layout.mesh.shape["tensor"] == 1 else set(MANUAL)
    in_specs = (by_hand(layout.specs, layout.mesh), TABLE.tokens_bt) if in_specs is None else in_specs
    return jax.shard_map(
        body, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
    )


def sequence_axis(layout: Layout) -> str | None:
    """The axis along which the memory joins the parts of a row, where there are several."""
    return "sequence" if layout.mesh.shape["sequence"] > 1 else None


def hidden_and_kernel(layout: Layout, params: Params, tokens: Array, segment_ids: Array) -> tuple[Array, Array]:
    """On each device: the hidden states [B, T, D] of its tokens, and the whole matrix [E, D] of the logits."""
    specs = by_hand(layout.specs, layout.mesh)
    layer = gatherer(of_one_layer(specs["blocks"]))
    rest = {name: part for name, part in params.items() if name != "blocks"}
    whole = gatherer({name: specs[name] for name in rest})(rest) | {"blocks": params["blocks"]}
    model = nnx.merge(nnx.graphdef(layout.abstract), whole)
    hidden, _ = model.hidden(tokens, segment_ids, sequence_axis=sequence_axis(layout), gather=layer)
    kernel = whole["unembedding"]["kernel"].T if "unembedding" in whole else whole["embedding"]
    return hidden, kernel


def _sums(layout: Layout, params: Params, batch: Batch, z_loss: float, chunk: int) -> LossSums:
    hidden, kernel = hidden_and_kernel(layout, params, batch["tokens"], batch["segment_ids"])
    return chunked_loss(hidden, kernel, batch["targets"], batch["mask"], chunk=chunk, z_loss=z_loss)


def loss_sums(layout: Layout, params: Params, batch: Batch, *, chunk: int = 2048) -> LossSums:
    """Over the whole batch, without a gradient."""
    body = lambda params, batch: lax.psum(_sums(layout, params, batch, 0.0, chunk), MANUAL)  # noqa: E731
    sums: LossSums = mapped(layout, body, SUMS)(params, batch)
    return sums


Signs = Callable[..., dict[str, Array]]  # of (model, tokens)


def looker(layout: Layout, signs: Signs) -> Callable[..., dict[str, Array]]:
    """(params, tokens) to what `signs` tells of the model, divided by the compiler: it is a few rows now and then."""

    def look(params: Params, tokens: Array) -> dict[str, Array]:
        return signs(nnx.merge(nnx.graphdef(layout.abstract_by_xla), params), tokens)

    return jax.jit(look, out_shardings=NamedSharding(layout.mesh, P()))


def gradient(
    layout: Layout, params: Params, batch: Batch, *, microbatches: int, z_loss: float, chunk: int
) -> tuple[Params, LossSums]:
    """(gradient of the sum of the objective over the whole batch, the sums), `microbatches` parts one after the other."""

    def objective(params: Params, batch: Batch) -> tuple[Array, LossSums]:
        sums = _sums(layout, params, batch, z_loss, chunk)
        return sums.objective, sums

    def body(params: Params, batch: Batch) -> tuple[Params, LossSums]:
        parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, x.shape[1]), batch)

        def add(total: tuple[Params, LossSums], part: Batch) -> tuple[tuple[Params, LossSums], None]:
            own, sums = jax.grad(objective, has_aux=True)(params, part)
            return jax.tree.map(jnp.add, total, (own, sums)), None

        zero = (jax.tree.map(jnp.zeros_like, params), LossSums(*jnp.zeros(3)))
        if microbatches == 1:
            own, sums = jax.grad(objective, has_aux=True)(params, batch)
        else:
            (own, sums), _ = lax.scan(add, zero, parts)
        return summed(own, by_hand(layout.specs, layout.mesh)), lax.psum(sums, MANUAL)

    result: tuple[Params, LossSums] = mapped(layout, body, (by_hand(layout.specs, layout.mesh), SUMS))(params, batch)
    return result
