"""Compiles the delta rule's kernels for a TPU that is not there: `python compile_delta_rule.py TOPOLOGY` prints one line."""

import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.delta_rule import delta_rule

B, T, H, K, V = 8, 2048, 4, 256, 256


def loss(q, k, v, beta, log_decay, initial, documents):
    """As in the model, where a projection makes the heads side by side."""
    q, k, v = (x.reshape(B, T, H, -1) for x in (q, k, v))
    result = delta_rule(
        q,
        k,
        v,
        beta,
        log_decay,
        scale=K**-0.5,
        normalise=True,
        documents=documents,
        initial=initial,
        magnitude="surprise",
    )
    score = jnp.sum(result.magnitude)
    return jnp.sum(result.out.astype(jnp.float32)) + jnp.sum(result.final) + score


def main(name: str) -> None:
    device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
    keys, values, gates = (B, T, H * K), (B, T, H * V), (B, T, H)
    shapes = [(keys, "bfloat16")] * 2 + [(values, "bfloat16")] + [(gates, "float32")] * 2
    shapes += [((B, H, K, V), "float32"), ((B, T), "int32")]
    arrays = [jax.ShapeDtypeStruct(s, d, sharding=SingleDeviceSharding(device)) for s, d in shapes]
    for what, run in (("forward", loss), ("both", jax.grad(loss, argnums=tuple(range(6))))):
        compiled = jax.jit(run).lower(*arrays).compile()
        assert "delta_rule_forward" in compiled.as_text()
        print(name, what, "temporary", compiled.memory_analysis().temp_size_in_bytes)


if __name__ == "__main__":
    main(sys.argv[1])
