"""The public function: what the parts of the kernels come to, and the few numbers that are changed outside of them."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hola.operation import Learned
from pallas_kernels.step.arrays import Memory, refuse, sizes
from pallas_kernels.step.gpu import evict, kernel
from pallas_kernels.step.gpu.kernel import Call, Counts, Results, Store, Token
from pallas_kernels.step.limits import gpu_refuses


def step(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array,
    learned: Learned,
    memory: Memory,
    document: Array,
    *,
    scale: float,
    score: Literal["surprise", "residual"] | Array = "surprise",
    read: Literal["rmsnorm", "unit_l2"] = "rmsnorm",
    energy: float | None = None,
    interpret: Any = None,
) -> tuple[Array, Memory]:
    """As `pallas_kernels.step.step`, which tells of the arguments and the results; for a bfloat16 cache.

    `interpret` is a `plgpu.InterpretGPUParams`, or True for one.
    """
    refuse(q, k, v, beta, log_decay, memory, document, score, read)
    given = sizes(k, v, memory)
    if why_not := gpu_refuses(given, energy):
        raise NotImplementedError(why_not)
    call = Call(
        batch=q.shape[0],
        heads=given.heads,
        key_heads=given.key_heads,
        block=given.block,
        window=given.window,
        key_dim=given.key_dim,
        value_dim=given.value_dim,
        scale=scale,
        share=1.0 / given.key_dim if read == "rmsnorm" else 1.0,
        dtype=v.dtype,
        interpret=plgpu.InterpretGPUParams() if interpret is True else interpret or None,
    )
    real = document > 0
    new = real & (document != memory.document)
    fill = memory.position % call.block
    start = jnp.where(new, memory.position, memory.document_start)
    place = jnp.arange(call.block, dtype=jnp.int32)
    seen = (memory.position - fill)[:, None] + place >= start[:, None]  # of the tokens before this one and itself
    cache_scores = jnp.where(new[:, None, None], -jnp.inf, memory.cache_scores)
    cache_positions = jnp.where(new[:, None, None], -1, memory.cache_positions)

    token = Token(
        q=q,
        k=k,
        v=v,
        beta=beta.astype(jnp.float32),
        log_decay=log_decay.astype(jnp.float32),
        query_scale=_of_heads(learned.query_scale, call.heads),
        key_scale=_of_heads(learned.key_scale, call.key_heads),
        cache_scores=memory.cache_scores,
    )
    counts = Counts(document, memory.document, memory.document_start, memory.position)
    store = Store(*(jax.new_ref(x) for x in (memory.fast_weights, *memory[1:3], *memory[5:7])))
    found = kernel.run(call, counts, token, store)

    squares = jnp.sum(found.squares, axis=2)
    spoilt = jnp.isnan(squares)
    answer = found.answer + learned.gate.astype(jnp.float32)[:, None] * _read(learned.sink_logit, found)
    out = jnp.where(spoilt[..., None], jnp.nan, answer)
    out = jnp.where(real[:, None, None], out, 0.0).astype(v.dtype)

    if isinstance(score, str):
        norm = jnp.sqrt(squares)
        score = norm if score == "residual" else token.beta * norm
    score = jnp.where(spoilt, 0.0, score)
    here = (place == fill[:, None]) & real[:, None]
    block_scores = jnp.where(here[:, None], score.astype(jnp.float32)[..., None], memory.block_scores)
    complete = real & (fill == call.block - 1)
    competing = jnp.concatenate([cache_scores, jnp.where(seen[:, None], block_scores, -jnp.inf)], axis=2)
    chosen = evict.run(call, complete.astype(jnp.int32), competing, store)

    positions = (memory.position - fill)[:, None, None] + place
    positions = jnp.concatenate([cache_positions, jnp.broadcast_to(positions, block_scores.shape)], axis=2)
    ends, row = complete[:, None, None], jnp.maximum(chosen - 1, 0)
    kept_scores, kept_positions = (jnp.take_along_axis(x, row, axis=2, mode="clip") for x in (competing, positions))
    fast_weights, cache_keys, cache_values, block_keys, block_values = (jax.freeze(x) for x in store)
    return out, Memory(
        fast_weights=fast_weights,
        cache_keys=cache_keys,
        cache_values=cache_values,
        cache_scores=jnp.where(ends, jnp.where(chosen > 0, kept_scores, -jnp.inf), cache_scores),
        cache_positions=jnp.where(ends, jnp.where(chosen > 0, kept_positions, -1), cache_positions),
        block_keys=block_keys,
        block_values=block_values,
        block_scores=jnp.where(ends, 0.0, block_scores),
        position=memory.position + real,
        document=jnp.where(new, document, memory.document),
        document_start=start,
    )


def _of_heads(scale: Array, heads: int) -> Array:
    """[heads, K] of that or of [K]."""
    return jnp.broadcast_to(scale.astype(jnp.float32), (heads, scale.shape[-1]))


def _read(sink_logit: Array, found: Results) -> Array:
    """The read [B, H, V]: the parts and the sink in one softmax."""
    sink = sink_logit.astype(jnp.float32)
    top = jnp.maximum(jnp.max(found.tops, axis=2), sink)
    weights = jnp.where(found.totals == 0, 0.0, jnp.exp(found.tops - top[..., None]))
    total = jnp.sum(found.totals * weights, axis=2) + jnp.exp(sink - top)
    means = jnp.where((found.totals == 0)[..., None], 0.0, found.means)
    return jnp.sum(means * weights[..., None], axis=2) / total[..., None]
