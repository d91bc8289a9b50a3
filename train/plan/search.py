"""Meshes for a number of chips: those that divide the model and the batch, the most promising first, without a compiler."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from hola_jax.config import flops_per_token
from hola_jax.model import Params
from train.config import TrainConfig
from train.layout import Layout
from train.mesh import AXES, MeshConfig, check_batch, make_mesh
from train.plan import collectives
from train.plan.topology import Topology
from train.shardings import param_specs

AGAIN = {"none": 1.0, "dots": 1.1, "full": 4 / 3}  # operations of a step with what the backward pass makes again


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, with rough bytes of one chip and rough seconds of a step."""

    mesh: MeshConfig
    bytes: float
    seconds: float


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def shapes(devices: int) -> list[tuple[int, ...]]:
    """All (data, fsdp, tensor, sequence) of so many devices."""
    sizes = itertools.product(divisors(devices), repeat=len(AXES) - 1)
    return [(devices // math.prod(rest), *rest) for rest in sizes if devices % math.prod(rest) == 0]


def candidates(config: TrainConfig, topology: Topology) -> list[Candidate]:
    """The meshes that divide model and batch; those that may fit first, and of them the fastest."""
    first = make_mesh(MeshConfig(slices=config.mesh.slices), topology.devices)
    params = Layout(config.model, first).params
    found = []
    for shape in shapes(len(topology.devices)):
        choice = MeshConfig(**dict(zip(AXES, shape, strict=True)), slices=config.mesh.slices)
        if (mesh := usable(config, choice, topology, params)) is not None:
            found.append(estimate(config, choice, mesh, topology, params))
    room = topology.chip.memory * 1.1  # the estimate is rough: the compiler decides about what is near
    return sorted(found, key=lambda each: (each.bytes > room, each.bytes if each.bytes > room else each.seconds))


def usable(config: TrainConfig, choice: MeshConfig, topology: Topology, params: Params) -> Mesh | None:
    """The mesh, where it divides what the sharding table and the batch want divided."""
    model = config.model
    if choice.tensor * choice.sequence > topology.per_host or model.heads % choice.tensor:
        return None  # what talks in every layer stays on the fast network, and heads stay whole
    if model.key_head_count % choice.tensor:
        return None
    try:
        mesh = make_mesh(choice, topology.devices)
        check_batch(mesh, config.global_batch, config.microbatches, config.row, model.memory.block)
    except (ValueError, NotImplementedError):  # the second: this torus cannot be cut so
        return None
    return None if param_specs(params, mesh)[1] else mesh


def parts(params: Params, mesh: Mesh, without: tuple[str, ...] = ()) -> float:
    """Bytes of the float32 parameters on one device, as if not divided along the axes of `without`."""
    specs = jax.tree.leaves(param_specs(params, mesh)[0], is_leaf=lambda x: isinstance(x, P))

    def share(spec: P) -> int:
        return math.prod(mesh.shape[axis] for axis in spec if axis is not None and axis not in without)

    leaves: list[Any] = jax.tree.leaves(params)
    return sum(4 * x.size / share(spec) for x, spec in zip(leaves, specs, strict=True))


def tokens_at_once(config: TrainConfig, mesh: Mesh) -> float:
    """Tokens of one device in one microbatch."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["sequence"]
    return config.global_batch * config.row / (shards * config.microbatches)


def rough_bytes(config: TrainConfig, mesh: Mesh, params: Params) -> float:
    """State, gradient and activations of one device. The factors are fitted to what the compiler needs at 340M."""
    model, tokens, tensor = config.model, tokens_at_once(config, mesh), mesh.shape["tensor"]
    width = model.compute_dtype.itemsize
    inner, mlp = model.heads * model.value_width / tensor, model.mlp_width / tensor
    kept = {
        "full": model.dim,
        "dots": 2 * model.dim + 5 * inner + 3 * mlp,
        "none": 12 * model.dim + 32 * inner + 6 * mlp,
    }
    block = 4 * tokens * (12 * model.dim + 32 * inner + 6 * mlp)
    own, layer = parts(params, mesh), parts({"blocks": params["blocks"]}, mesh, ("fsdp",)) / model.layers
    logits = 2 * 4 * min(config.loss_chunk, tokens) * model.vocab_size
    state = own * (
        4.5 if config.microbatches == 1 else 5.5
    )  # parameters, moments, gradient and its sum, a bfloat16 copy
    return state + 2 * layer + logits + model.layers * tokens * kept[model.remat] * width + block


def rough_seconds(config: TrainConfig, mesh: Mesh, topology: Topology, params: Params) -> float:
    """Products and collectives, one after the other."""
    chip, model, tokens = topology.chip, config.model, tokens_at_once(config, mesh)
    flops = 3 * flops_per_token(model, config.row) * config.global_batch * config.row * AGAIN[model.remat]
    total = flops / (chip.flops * chip.matmul_efficiency * len(topology.devices))

    def talk(kind: str, size: float, axes: tuple[str, ...]) -> float:
        devices = collectives.group_of(mesh, axes)
        speed = collectives.bandwidth(topology, devices) if devices.size > 1 else 0.0
        return collectives.seconds(kind, size, devices.size, speed)

    whole, rounds = parts(params, mesh, ("fsdp",)), config.microbatches
    total += rounds * (2 * talk("all-gather", whole, ("fsdp",)) + talk("reduce-scatter", whole, ("fsdp",)))
    total += talk("all-reduce", parts(params, mesh), ("data", "sequence"))
    activations = tokens * model.dim * model.compute_dtype.itemsize
    joins = rounds * model.layers * (4 if model.remat == "none" else 6)
    total += joins * talk("all-reduce", activations, ("tensor",))
    rows = config.global_batch / (mesh.shape["data"] * mesh.shape["fsdp"] * rounds)
    state = 4 * rows * model.heads * model.key_width * (model.key_width + model.value_width) * mesh.shape["sequence"]
    return total + 3 * rounds * model.layers * talk("all-gather", state, ("sequence",))


def estimate(config: TrainConfig, choice: MeshConfig, mesh: Mesh, topology: Topology, params: Params) -> Candidate:
    """The candidate of a mesh."""
    return Candidate(choice, rough_bytes(config, mesh, params), rough_seconds(config, mesh, topology, params))
