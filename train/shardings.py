"""The sharding table: one frozen spec per class of tensor, and which parameter is of which class.

Parameters lie in parts along "fsdp" and "tensor". The forward pass runs in shard_map: along data, fsdp and sequence what
travels is written down (a layer's parameters are gathered, its gradient is scattered back), so nothing else can; along
tensor the compiler divides the work, led by the parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hola_jax.array_types import Array
from hola_jax.model import GATHERED, Params

BATCH = ("data", "fsdp")
MANUAL = (*BATCH, "sequence")  # axes along which shard_map divides the forward pass by hand
Specs = Any  # a tree like the parameters, of PartitionSpec


@dataclasses.dataclass(frozen=True)
class ShardingTable:
    """A name ends in the tensor's shape: N layers, D width, E vocabulary, F inside of the MLP, X channels of all heads,
    H heads, K channels of one head, R rank, W taps of a convolution, B rows, T tokens, C and G channels of one head before
    and after it. In features_nhkf, F is the features of one head."""

    embedding_ed: P = P("tensor", "fsdp")
    unembedding_de: P = P("fsdp", "tensor")
    norm_d: P = P(None)
    norm_nd: P = P(None, None)
    into_heads_ndx: P = P(None, "fsdp", "tensor")
    from_heads_nxd: P = P(None, "tensor", "fsdp")
    into_rank_ndr: P = P(None, "fsdp", None)
    from_rank_nrx: P = P(None, "fsdp", "tensor")
    bias_nx: P = P(None, "tensor")
    convolution_nwx: P = P(None, None, "tensor")
    convolution_nwhcg: P = P(None, None, "tensor", "fsdp", None)
    of_head_nhc: P = P(None, "tensor", None)
    of_head_nh: P = P(None, "tensor")
    features_nhkf: P = P(None, "tensor", "fsdp", None)
    of_channel_nk: P = P(None, None)
    into_mlp_ndf: P = P(None, "fsdp", "tensor")
    from_mlp_nfd: P = P(None, "tensor", "fsdp")
    tokens_bt: P = P(BATCH, "sequence")


TABLE = ShardingTable()

CLASSES = {
    "embedding": "embedding_ed",
    "unembedding.kernel": "unembedding_de",
    "norm.*": "norm_d",
    "read.query": "norm_d",
    "read.scale": "norm_d",
    "blocks.*_read.query": "norm_nd",  # whole, for all layers' readers run before their layers
    "blocks.*_read.scale": "norm_nd",
    "blocks.mixer_norm.*": "norm_nd",
    "blocks.mlp_norm.*": "norm_nd",
    "blocks.*_answer_norm.scale": "norm_nd",
    "blocks.mlp.gate.kernel": "into_mlp_ndf",
    "blocks.mlp.up.kernel": "into_mlp_ndf",
    "blocks.mlp.down.kernel": "from_mlp_nfd",
    "blocks.mixer.query.kernel": "into_heads_ndx",
    "blocks.mixer.key.kernel": "into_heads_ndx",
    "blocks.mixer.value.kernel": "into_heads_ndx",
    "blocks.mixer.gate.kernel": "into_heads_ndx",
    "blocks.mixer.beta.kernel": "into_heads_ndx",
    "blocks.mixer.forget.kernel": "into_heads_ndx",
    "blocks.mixer.decay.projection.kernel": "into_heads_ndx",
    "blocks.mixer.*.down.kernel": "into_rank_ndr",
    "blocks.mixer.*.up.kernel": "from_rank_nrx",
    "blocks.mixer.*.up.bias": "bias_nx",
    "blocks.mixer.output.kernel": "from_heads_nxd",
    "blocks.mixer.*_conv.kernel": "convolution_nwx",
    "blocks.mixer.norm.scale": "of_channel_nk",
    "blocks.mixer.query_norm.scale": "of_channel_nk",
    "blocks.mixer.key_norm.scale": "of_channel_nk",
    "blocks.mixer.decay.A_log": "of_head_nh",
    "blocks.mixer.decay.dt_bias": "of_head_nh",  # of KDA: one per channel, X
    "blocks.mixer.cache.query_scale": "of_channel_nk",
    "blocks.mixer.cache.key_scale": "of_channel_nk",
    "blocks.mixer.cache.sink_logit": "of_head_nh",
    "blocks.mixer.cache.gate_logit": "of_head_nh",
    "blocks.mixer.cache.temperature": "of_head_nh",
    "blocks.mixer.cache.power": "of_head_nh",
    "blocks.mixer.retention.conv*.kernel": "convolution_nwhcg",
    "blocks.mixer.retention.weight": "of_head_nhc",
    "blocks.mixer.retention.bias": "of_head_nh",
    "blocks.mixer.*_features.kernel": "features_nhkf",
    "blocks.mixer.mix_logit": "of_head_nh",
}


def path_name(path: tuple[Any, ...]) -> str:
    """Such as "blocks.mixer.query.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def spec_of(name: str, table: ShardingTable = TABLE) -> P:
    """The table's spec for the parameter called `name`."""
    found = next((kind for pattern, kind in CLASSES.items() if fnmatchcase(name, pattern)), None)
    if found is None:
        raise ValueError(
            f"the sharding table has no class for the parameter {name!r}; add it to train.shardings.CLASSES"
        )
    spec: P = getattr(table, found)
    return spec


def _fitted(name: str, shape: tuple[int, ...], mesh: Mesh, undivided: list[str]) -> P:
    """The table's spec, without the axes that do not divide the tensor; those are told to `undivided`."""
    spec = spec_of(name)
    if len(spec) != len(shape):
        raise ValueError(f"the parameter {name!r} has shape {shape}, its class in the sharding table {len(spec)} axes")
    fitted: list[str | None] = []
    for axis, size in zip(spec, shape, strict=True):
        fits = axis is None or size % mesh.shape[axis] == 0
        fitted.append(axis if fits else None)
        if not fits:
            undivided.append(
                f"{name} {list(shape)}: {size} is no multiple of {axis}={mesh.shape[axis]}, so whole along it"
            )
    return P(*fitted)


def param_specs(params: Params, mesh: Mesh) -> tuple[Specs, list[str]]:
    """(a spec for each parameter, a line for each dimension that the mesh does not divide and that stays whole)."""
    undivided: list[str] = []
    specs = jax.tree_util.tree_map_with_path(lambda path, x: _fitted(path_name(path), x.shape, mesh, undivided), params)
    return specs, undivided


def placed(specs: Specs, mesh: Mesh) -> Any:
    """The specs as shardings of this mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def by_hand(specs: Specs, mesh: Mesh) -> Specs:
    """What shard_map is told of the specs: not "tensor", which is the compiler's, nor axes of one device."""
    keep = lambda spec: P(*(axis if axis in MANUAL and mesh.shape[axis] > 1 else None for axis in spec))  # noqa: E731
    return jax.tree.map(keep, specs, is_leaf=lambda x: isinstance(x, P))


def gatherer(specs: Specs) -> Callable[[Params], Params]:
    """Makes whole parameters of this device's parts along "fsdp"; backward, it scatters the gradient's sum."""

    def whole(x: Array, spec: P) -> Array:
        if "fsdp" not in spec:
            return x
        return checkpoint_name(lax.all_gather(x, "fsdp", axis=spec.index("fsdp"), tiled=True), GATHERED)

    return lambda params: jax.tree.map(whole, params, specs)


def of_one_layer(specs: Specs) -> Specs:
    """The specs of the blocks without their leading axis N."""
    return jax.tree.map(lambda spec: P(*spec[1:]), specs, is_leaf=lambda x: isinstance(x, P))


def summed(gradient: Params, specs: Specs) -> Params:
    """The gradient, summed over the axes by hand along which a parameter is whole."""
    return jax.tree.map(
        lambda g, spec: lax.psum(g, tuple(axis for axis in MANUAL if axis not in spec)), gradient, specs
    )
