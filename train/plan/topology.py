"""Devices to compile for, from a name such as v5p:4x4x4; none of them has to be there."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from hola_jax.config import unknown_name
from train.config import RunError
from train.plan.chips import CHIPS, Chip, target_config

EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:4x4, v4:2x2x2 (chips along each axis), h200:4x8, h100:1x8 (hosts x GPUs) or cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """name    as it was given
    chip     what its devices are
    sizes    chips along each axis of the torus, (hosts, GPUs of each), or (host devices,)
    devices  to compile for
    """

    name: str
    chip: Chip
    sizes: tuple[int, ...]
    devices: list[Any]

    @property
    def per_host(self) -> int:
        """Devices that the fast network joins."""
        return self.sizes[1] if self.chip.kind == "gpu" else len(self.devices)


def parsed(name: str) -> tuple[str, tuple[int, ...]]:
    """("v5p", (4, 4, 4)) of "v5p:4x4x4"."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not found:
        raise ValueError(f"--topology is {name!r}; write a chip and its arrangement, such as {EXAMPLES}")
    chip, sizes = found[1].lower(), tuple(int(size) for size in found[2].split("x"))
    if chip not in CHIPS:
        raise unknown_name("the chip of --topology", chip, CHIPS)
    axes = {"gpu": 2, "cpu": 1}.get(CHIPS[chip].kind, 2 if chip in ("v5e", "v6e") else 3)
    if len(sizes) != axes or math.prod(sizes) < 1:
        raise ValueError(f"--topology is {name!r}; {chip} takes {axes} positive sizes, such as {EXAMPLES}")
    return chip, sizes


def topology(name: str) -> Topology:
    """The devices of a name. Sets what libtpu and XLA read from this process's environment."""
    chip, sizes = parsed(name)
    make = {"tpu": _tpu, "gpu": _gpu, "cpu": _host}[CHIPS[chip].kind]
    return Topology(name, CHIPS[chip], sizes, make(chip, sizes))


def _tpu(chip: str, sizes: tuple[int, ...]) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise RunError(
            "planning for a TPU compiles with libtpu, which is not installed: `pip install libtpu` (no TPU is needed)"
        )
    # There is no metadata server to ask and no chip to lock; the last two only spare its complaints about that.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}
    _no_accelerator()
    options = {"chip_config_name": "megacore"} if chip == "v4" else {}
    name = f"{chip}:{'x'.join(map(str, sizes))}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"libtpu refuses --topology {name}: {str(error).splitlines()[0]}") from error
    if len(found) != math.prod(sizes):
        raise RunError(
            f"libtpu gives {len(found)} devices for the {math.prod(sizes)} chips of {name}; use another chip"
        )
    return list(found)


def _gpu(chip: str, sizes: tuple[int, ...]) -> list[Any]:
    if importlib.util.find_spec("jax_cuda13_plugin") is None and importlib.util.find_spec("jax_cuda12_plugin") is None:
        version = jax.__version__
        raise RunError(
            "planning for GPUs compiles with JAX's CUDA plugin, which is not installed: `pip install --no-deps "
            f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}` (no GPU and no CUDA is needed)"
        )
    _no_accelerator()
    hosts, each = sizes
    name = f"1x{hosts}x{each}"  # slices, hosts of each, GPUs of each
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=name, topology=name, target_config=target_config(chip)
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise RunError(f"the CUDA plugin does not make {chip}:{hosts}x{each}: {str(error).splitlines()[0]}") from error
    return list(found.devices)


def _host(chip: str, sizes: tuple[int, ...]) -> list[Any]:
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={sizes[0]}"
    _no_accelerator()
    found = jax.devices("cpu")
    if len(found) < sizes[0]:
        raise ValueError(
            f"--topology {chip}:{sizes[0]} needs {sizes[0]} host devices and there are {len(found)}; "
            f"set XLA_FLAGS={flag}={sizes[0]}"
        )
    return list(found[: sizes[0]])


def _no_accelerator() -> None:
    """The devices of this machine play no part, and are not taken from who uses them."""
    jax.config.update("jax_platforms", "cpu")
