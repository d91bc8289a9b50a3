"""The training step: one compiled program from (state, batch) to (state, metrics)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hola_jax.array_types import Array
from train import forward, optimizer
from train.layout import Batch, Layout, State
from train.optimizer import OptimizerConfig

Metrics = dict[str, Array]  # scalars, whole on every device


@dataclasses.dataclass(frozen=True)
class Training:
    """What a step is made of.

    steps         of the whole run: the learning rate follows them
    microbatches  parts of a batch that are computed one after the other, to save memory; the result is the same
    z_loss        weight of the squared log sum of the softmax
    loss_chunk    tokens of one device whose logits exist at a time
    """

    layout: Layout
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 1000
    microbatches: int = 1
    z_loss: float = 0.0
    loss_chunk: int = 2048

    def step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One step. Where loss or gradient is not finite, parameters and moments stay, and "skipped" counts it."""
        gradient, sums = forward.gradient(
            self.layout,
            state["params"],
            batch,
            microbatches=self.microbatches,
            z_loss=self.z_loss,
            chunk=self.loss_chunk,
        )
        count = jnp.maximum(sums.tokens, 1.0)
        gradient = jax.tree.map(lambda g: g / count, gradient)
        norm = optax.tree.norm(gradient)
        rate = self.optimizer.learning_rate(state["step"], self.steps)
        new = optimizer.update(
            self.optimizer,
            state["params"],
            state["optimizer"],
            optimizer.clipped(gradient, norm, self.optimizer.clip),
            self.layout.decayed,
            rate,
        )
        finite = jnp.isfinite(sums.objective) & jnp.isfinite(norm)
        old = (state["params"], state["optimizer"])
        params, moments = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        skipped = state["skipped"] + ~finite
        metrics = {
            "loss": sums.nll / count,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens": sums.tokens,
            "skipped": skipped,
        }
        return {"params": params, "optimizer": moments, "step": state["step"] + 1, "skipped": skipped}, metrics

    def lower(self, rows: int, tokens: int) -> jax.stages.Lowered:
        """The step, lowered for batches [rows, tokens]; `.compile()` makes it run. The state given to it is donated."""
        whole = NamedSharding(self.layout.mesh, P())
        step = jax.jit(self.step, donate_argnums=0, out_shardings=(self.layout.state_shardings, whole))
        return step.lower(self.layout.abstract_state(), self.layout.abstract_batch(rows, tokens))

    def lower_evaluation(self, rows: int, tokens: int) -> jax.stages.Lowered:
        """(params, batch) to the sums of the loss, lowered."""

        def evaluate(params: Any, batch: Batch) -> Any:
            return forward.loss_sums(self.layout, params, batch, chunk=self.loss_chunk)

        state, batch = self.layout.abstract_state(), self.layout.abstract_batch(rows, tokens)
        return jax.jit(evaluate, out_shardings=NamedSharding(self.layout.mesh, P())).lower(state["params"], batch)
