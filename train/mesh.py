"""The mesh: which device holds which part. Four axes, always all of them, most of size 1."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor", "sequence")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices stand along each axis.

    data      rows of a batch, parameters whole on each; -1 takes what the other axes leave
    fsdp      rows of a batch, parameters in parts
    tensor    heads, channels and vocabulary
    sequence  tokens of a row: the memory's own scan joins the parts
    slices    groups of devices joined by a slow network; the data axis runs across them
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    slices: int = 1

    def __post_init__(self) -> None:
        for name in (*AXES, "slices"):
            size = getattr(self, name)
            if name == "data" and size == -1:
                continue
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                rest = " or -1" if name == "data" else ""
                raise ValueError(f"mesh.{name} is {size!r}; it must be an integer of at least 1{rest}")

    def shape(self, devices: int) -> tuple[int, int, int, int]:
        """Sizes of the axes for so many devices."""
        others = self.fsdp * self.tensor * self.sequence
        data = devices // others if self.data == -1 else self.data
        if data * others != devices:
            asked = ", ".join(f"{name} {getattr(self, name)}" for name in AXES)
            raise ValueError(
                f"the mesh ({asked}) does not use {devices} devices exactly; make the product of its axes {devices}"
                + ("" if self.data == -1 else ", or set mesh.data to -1 to take what the other axes leave")
            )
        if data % self.slices:
            raise ValueError(f"mesh.slices is {self.slices}; it must divide the data axis, which has {data} devices")
        return data, self.fsdp, self.tensor, self.sequence


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (None: all there are), neighbours on the fast network next to each other."""
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    automatic = (AxisType.Auto,) * len(AXES)
    if config.slices == 1:
        return jax.make_mesh(shape, AXES, devices=devices, axis_types=automatic)
    within = (shape[0] // config.slices, *shape[1:])
    return Mesh(_hybrid(within, config.slices, devices), AXES, axis_types=automatic)


def _hybrid(within: tuple[int, ...], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices with the data axis across slices, whole slices one after the other."""
    known = {getattr(device, "slice_index", None) for device in devices}
    if len(known) == slices:
        across = (slices, *[1] * (len(within) - 1))
        return mesh_utils.create_hybrid_device_mesh(within, across, devices)
    if len({device.process_index for device in devices}) % slices == 0 or known == {None} or known == {0}:
        # No slices that the devices know of (GPU nodes, hosts): equal parts in the order of their numbers.
        return np.asarray(devices, dtype=object).reshape(slices * within[0], *within[1:])
    raise ValueError(f"mesh.slices is {slices}; the devices stand in {len(known)} slices, so set it to {len(known)}")


def batch_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, rows: int, microbatches: int, tokens: int, block: int) -> None:
    """Raises where a batch of `rows` rows of `tokens` tokens cannot be cut for this mesh; `block` is the memory's."""
    unit = batch_shards(mesh) * microbatches
    if rows % unit:
        raise ValueError(
            f"global_batch is {rows}; it must be a multiple of {unit}: {mesh.shape['data']} data x {mesh.shape['fsdp']} fsdp"
            f" devices x {microbatches} microbatches"
        )
    parts = mesh.shape["sequence"]
    if parts > 1 and tokens % (parts * block):
        least = math.ceil(tokens / (parts * block)) * parts * block
        raise ValueError(
            f"row is {tokens} tokens; along {parts} devices of the sequence axis each holds whole blocks of {block}, so "
            f"make it a multiple of {parts * block}, such as {least}"
        )
