"""Compiles the delta rule's GPU kernels for an H200 that is not there: `python compile_delta_rule_gpu.py WIDTH` prints
what the forward pass and both passes need."""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from pallas_kernels.delta_rule.gpu import delta_rule
from tests.pallas_kernels import h200

B, T, H = 8, 2048, 4


def loss(q, k, v, beta, log_decay, initial, documents):
    given = {"documents": documents, "initial": initial, "magnitude": "surprise"}
    out, score, final = delta_rule(q, k, v, beta, log_decay, scale=k.shape[-1] ** -0.5, normalise=True, **given)
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(final) + jnp.sum(score)


def lowered(width):
    """The forward pass and both passes at the 340M shapes, with K = V = `width`, lowered for an H200."""
    tokens, gates = ((B, T, H, width), "bfloat16"), ((B, T, H), "float32")
    shapes = [tokens] * 3 + [gates] * 2 + [((B, H, width, width), "float32"), ((B, T), "int32")]
    sharding = SingleDeviceSharding(h200.topology())
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    runs = {"forward": loss, "both": jax.grad(loss, argnums=tuple(range(6)))}
    return {what: jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)) for what, run in runs.items()}


KERNELS = {
    "forward": ("delta_rule_matrices", "delta_rule_states", "delta_rule_outputs"),
    "both": ("delta_rule_matrices", "delta_rule_states", "delta_rule_state_gradients"),
}


def main(width):
    for what, program in lowered(width).items():
        compiled = program.compile()
        text = compiled.as_text()
        assert all(name in text for name in KERNELS[what]), KERNELS[what]
        print(width, what, "temporary", compiled.memory_analysis().temp_size_in_bytes)


if __name__ == "__main__":
    main(int(sys.argv[1]))
