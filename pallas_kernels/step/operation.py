"""The public function: what it accepts, and the little that is done around the kernel."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from pallas_kernels.cache.arrays import Rows
from pallas_kernels.hola.operation import Learned
from pallas_kernels.step.arrays import Memory, refuse, sizes
from pallas_kernels.step.kernel import Call, Counts, Numbers, Store, Token, run
from pallas_kernels.step.limits import tpu_refuses


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
    interpret: Any = False,
) -> tuple[Array, Memory]:
    """What one token of every row is answered [B, H, V], and the memory behind it, in place where the caller gives it away.

    q, k [B, h, K] and v [B, H, V] come before any norm; beta, log_decay [B, H]. Rows may stand at different positions.
    `document` [B] is the token's: 0 is padding, which changes nothing and is answered by zeros; another than the memory's
    begins with an empty memory. `score` is the write's magnitude, or given [B, H]. With `energy` the read keeps the fewest
    entries, the null sink among them, whose softmax weights reach that share, and tiles of values of which it keeps nothing
    stay where they are. Not differentiable.

    What is not finite stays in its row and head: of a query it spoils the answer, of anything else the state too, which then
    answers NaN until another document begins. What is stored of such a token is 0.
    """
    refuse(q, k, v, beta, log_decay, memory, document, score, read)
    given = sizes(k, v, memory)
    if why_not := tpu_refuses(given, bool(interpret)):
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
        residual=isinstance(score, str) and score == "residual",
        energy=energy,
        dtype=v.dtype,
        interpret=interpret,
    )
    real = document > 0
    new = real & (document != memory.document)
    document_start = jnp.where(new, memory.position, memory.document_start)
    place_0 = memory.position - memory.position % call.block
    counts = Counts(*(x.astype(jnp.int32) for x in (real, new, memory.position, document_start - place_0)))
    numbers = Numbers(
        beta=beta.astype(jnp.float32).reshape(-1),
        log_decay=log_decay.astype(jnp.float32).reshape(-1),
        score=None if isinstance(score, str) else score.astype(jnp.float32).reshape(-1),
        sink=learned.sink_logit.astype(jnp.float32),
        gate=learned.gate.astype(jnp.float32),
    )
    scales = (
        jnp.broadcast_to(x.astype(jnp.float32), (heads, call.key_dim))[:, None]
        for x, heads in ((learned.query_scale, call.heads), (learned.key_scale, call.key_heads))
    )
    token = Token(q[:, :, None], k[:, :, None], v[:, :, None], *scales)
    rows = Rows(*memory[1:3], *(x[:, :, None] for x in memory[3:5]))
    store = Store(memory.fast_weights, rows, *memory[5:7], memory.block_scores[:, :, None])
    out, after = run(call, counts, numbers, token, store)
    return out[:, :, 0], Memory(
        fast_weights=after.state,
        cache_keys=after.cache.keys,
        cache_values=after.cache.values,
        cache_scores=after.cache.scores[:, :, 0],
        cache_positions=after.cache.positions[:, :, 0],
        block_keys=after.block_keys,
        block_values=after.block_values,
        block_scores=after.block_scores[:, :, 0],
        position=memory.position + real,
        document=jnp.where(new, document, memory.document),
        document_start=document_start,
    )
