"""What the backward pass keeps of cheap functions: their arguments alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def lean(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, some passes over its arguments, whose backward pass makes again what it needs of them. Kept, that would be
    several times the arguments, most of it float32, and would take longer to write and read than to make.

    A rule of its own and no `jax.checkpoint`: the policy around a layer, which keeps all but a few names, would keep it."""
    call = jax.custom_vjp(work)
    call.defvjp(lambda *given: (work(*given), given), lambda given, change: jax.vjp(work, *given)[1](change))
    return call
