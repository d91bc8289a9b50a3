"""AdamW with the paper's recipe, its state a plain dict whose parts lie like the parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hola_jax.array_types import Array
from hola_jax.model import Params

State = dict[str, Any]  # {"count", "mu", "nu"}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """peak             learning rate after `warmup` steps, from there a cosine to `final` of it at the last step
    b1, b2, epsilon  of Adam
    weight_decay     of matrices; norms, gates, decays and biases are spared (`hola_jax.model.weight_decay_mask`)
    clip             largest norm of the whole gradient
    cache_rate       learning rate of what HOLA's exact cache alone has (scales, sink, gate), in multiples of the others'
    """

    peak: float = 4e-4
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    warmup: int = 1000
    final: float = 0.1
    clip: float = 1.0
    cache_rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("peak", "epsilon", "clip", "cache_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)!r}; it must be above 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)!r}; it must be at least 0 and below 1")
        for name in ("weight_decay", "warmup", "final"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)!r}; it must be at least 0")

    def learning_rate(self, step: Array | int, steps: int) -> Array:
        """Of step number `step`, counted from 0, of a run of `steps`. The first step learns already."""
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.peak, min(self.warmup, steps), max(steps, self.warmup + 1), self.peak * self.final
        )
        return jnp.asarray(schedule(jnp.asarray(step) + 1), jnp.float32)


def init(params: Params) -> State:
    """Before any step."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {"count": jnp.zeros((), jnp.int32), "mu": zeros, "nu": jax.tree.map(jnp.copy, zeros)}


def clipped(gradient: Params, norm: Array, clip: float) -> Params:
    """The gradient, no longer than `clip`."""
    factor = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * factor, gradient)


def update(
    config: OptimizerConfig, params: Params, state: State, gradient: Params, decayed: Params, rate: Array
) -> tuple[Params, State]:
    """Parameters and state after one step; `decayed` tells which parameters weight decay is for."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
    direction, after = adam.update(gradient, optax.ScaleByAdamState(**state))

    def moved(path: Any, p: Array, u: Array, decays: bool) -> Array:
        of_cache = jax.tree_util.DictKey("cache") in path
        own = rate * config.cache_rate if of_cache else rate
        return p - own * (u + config.weight_decay * p if decays else u)

    return jax.tree.map_with_path(moved, params, direction, decayed), after._asdict()
