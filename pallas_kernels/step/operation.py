"""The public function: what it accepts, and the little that is done around the kernel."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.cache.arrays import Rows
from pallas_kernels.cache.limits import DTYPES, VMEM
from pallas_kernels.hola.operation import Learned
from pallas_kernels.step.kernel import Call, Counts, Numbers, Store, Token, run


class Memory(NamedTuple):
    """All that is remembered of a prefix, as the library's state holds it."""

    fast_weights: Array  # [B, H, K, V] float32
    cache_keys: Array  # [B, H, W, K]
    cache_values: Array  # [B, H, W, V]
    cache_scores: Array  # [B, H, W] float32; -inf where a row is empty
    cache_positions: Array  # [B, H, W] int32; -1 where a row is empty
    block_keys: Array  # [B, h, C, K]
    block_values: Array  # [B, H, C, V]
    block_scores: Array  # [B, H, C] float32
    position: Array  # [B] int32
    document: Array  # [B] int32
    document_start: Array  # [B] int32


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
    interpret: Any = False,
) -> tuple[Array, Memory]:
    """What one token of every row is answered [B, H, V], and the memory behind it, in place where the caller gives it away.

    q, k [B, h, K] and v [B, H, V] come before any norm; beta, log_decay [B, H]. Rows may stand at different positions.
    `document` [B] is the token's: 0 is padding, which changes nothing and is answered by zeros; another than the memory's
    begins with an empty memory. `score` is the write's magnitude, or given [B, H]. Not differentiable.
    """
    call = _call(q, k, v, beta, log_decay, memory, document, scale, score, read, interpret)
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


def _call(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array,
    memory: Memory,
    document: Array,
    scale: float,
    score: str | Array,
    read: str,
    interpret: Any,
) -> Call:
    """The sizes; or what cannot run, or does not fit, before anything is compiled."""
    if log_decay.ndim == 3:
        raise NotImplementedError("the Pallas step takes one decay per head, not one per key channel")
    if isinstance(score, str) and score not in ("surprise", "residual"):
        raise NotImplementedError(
            f'score={score!r} is not made on the chip: "surprise" and "residual" are; give others as an array [B, H]'
        )
    if read not in ("rmsnorm", "unit_l2"):
        raise NotImplementedError(f'read={read!r}: the Pallas step reads by "rmsnorm" or "unit_l2"')
    (batch, heads, value_dim), (key_heads, key_dim) = v.shape, k.shape[1:]
    window, block, dtype = memory.cache_scores.shape[2], memory.block_scores.shape[2], memory.cache_values.dtype
    rows = batch, heads, window
    shapes: dict[str, tuple[int, ...]] = {
        "q": (batch, key_heads, key_dim),
        "beta": (batch, heads),
        "log_decay": (batch, heads),
        "document": (batch,),
        "fast_weights": (batch, heads, key_dim, value_dim),
        "cache_keys": (*rows, key_dim),
        "cache_values": (*rows, value_dim),
        "cache_scores": rows,
        "cache_positions": rows,
        "block_keys": (batch, key_heads, block, key_dim),
        "block_values": (batch, heads, block, value_dim),
        "block_scores": (batch, heads, block),
        "position": (batch,),
        "document_start": (batch,),
    }
    given = memory._asdict() | {"q": q, "beta": beta, "log_decay": log_decay, "document": document}
    for name, shape in shapes.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} is {given[name].shape}, want {shape} beside k {k.shape} and v {v.shape}")
    if heads % key_heads:
        raise ValueError(f"k has {key_heads} heads and v has {heads}; the key heads must divide the value heads")
    stored = (memory.cache_keys, memory.cache_values, memory.block_keys, memory.block_values, v)
    if dtype not in DTYPES or any(x.dtype != dtype for x in stored):
        raise NotImplementedError(
            f"cache, block and v are {', '.join(str(x.dtype) for x in stored)}; the Pallas step takes bfloat16 or "
            "float32, one of them"
        )
    call = Call(
        batch,
        heads,
        key_heads,
        block,
        window,
        key_dim,
        value_dim,
        scale,
        1.0 / key_dim if read == "rmsnorm" else 1.0,
        isinstance(score, str) and score == "residual",
        jnp.dtype(dtype),
        interpret,
    )
    _refuse_sizes(call)
    return call


def vmem_bytes(call: Call) -> int:
    """An upper estimate of what the kernel holds on the chip."""
    item, state, width = call.dtype.itemsize, 4 * call.key_dim * call.value_dim, call.key_dim + call.value_dim
    piped = 4 * state + 2 * item * (call.window + call.block) * width
    kept = 2 * state + item * (3 * call.block + 2 * call.window) * width
    return piped + kept + 4 * 4 * (call.window + call.block) * (call.window + call.block)


def _refuse_sizes(call: Call) -> None:
    """NotImplementedError where the kernel cannot run on a chip; in interpret mode only what has no cache is refused."""
    if call.window < 1:
        raise NotImplementedError("window=0 keeps no cache: there is no kernel for it; use the XLA path")
    if call.interpret:
        return
    for name, size in (("K", call.key_dim), ("V", call.value_dim)):
        if size % 64:
            raise NotImplementedError(f"{name}={size}: the Pallas step needs a multiple of 64; use the XLA path")
    if call.block % 128 or call.window % 16:
        raise NotImplementedError(
            f"block={call.block}, window={call.window}: the Pallas step needs a block of a multiple of 128 and a window of "
            "a multiple of 16; use the XLA path"
        )
    if (needed := vmem_bytes(call)) > VMEM:
        raise NotImplementedError(
            f"window={call.window}, block={call.block}, K={call.key_dim}, V={call.value_dim} need about "
            f"{needed / 2**20:.1f} MiB on the chip, which grants {VMEM / 2**20:.0f}; use a smaller window or block, or the "
            "XLA path"
        )
