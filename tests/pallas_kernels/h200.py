"""An H200 to compile for, which does not have to be there. The facts of the chip are those of `hola plan`."""

import importlib.util
from typing import Any

from train.plan.topology import topology as described

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def missing() -> str | None:
    """Why nothing can be compiled for an H200 here; None where it can."""
    if any(importlib.util.find_spec(name) for name in PLUGINS):
        return None
    return "JAX's CUDA plugin, which compiles, is not installed"


def topology() -> Any:
    """One H200. JAX itself is left with the host alone."""
    return described("h200:1x1").devices[0]
