"""HOLA's memory: the state S, the exact cache and the read over it, for a whole sequence, a piece of one, or one token.

`hola_memory` is the door. Behind it stand three ways of doing one thing: `reference` token by token, `piece` for many
tokens at once (on one device or along a mesh axis), `token` for decoding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from hola_jax.array_types import Array
from hola_jax.memory import by_kernels, kernels, poison, validate
from hola_jax.memory.align import Inputs
from hola_jax.memory.learned import held_down
from hola_jax.memory.piece import run_piece
from hola_jax.memory.reference import hola_reference
from hola_jax.memory.state import CacheParams, MemoryConfig, MemoryState, init_state
from hola_jax.memory.token import run_token


def hola_memory(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array,
    cache_params: CacheParams,
    *,
    config: MemoryConfig,
    segment_ids: Array | None = None,
    state: MemoryState | None = None,
    learned: Array | None = None,
    implementation: kernels.Implementation | None = None,
    check: bool = False,
    sequence_axis: str | None = None,
) -> tuple[Array, MemoryState]:
    """What the memory answers to each token, and the memory after the last: ([B, T, H, V], MemoryState).

    q, k [B, T, h, K] and v [B, T, H, V] come after convolution and SiLU, before any norm; h key heads serve H value heads.
    beta [B, T, H] is in [0, 2], log_decay [B, T, H] (or per key channel, [B, T, H, K]) is at most 0. Any T >= 1.

    segment_ids     [B, T] integers: the document of each token, not decreasing along a row, 0 for padding. Documents do not
                    see each other and padding is as if it were not there. None: all tokens belong to one document, that of
                    `state` where it has one.
    state           continues an earlier piece; None starts empty. One token with a state takes the decoding path.
    learned         [B, T, H]: the tokens' scores, where the score is "learned"; `learned.py` tells of their gradient.
    implementation  "reference", "xla", "pallas" (the platform's kernels), "pallas_tpu" (those of a TPU, which need not be
                    there to compile for it) or "interpret" (their programs without a TPU, slowly). None takes kernels where
                    platform and shape allow, and logs why not where they do not; a choice that cannot run raises
                    NotImplementedError. Kernels need a single device or shard_map; axes that the shard_map leaves to the
                    compiler divide the heads.
    check           also test what only values can tell (ranges, order of segment ids); inside jit it needs checkify.
    sequence_axis   inside shard_map: the mesh axis along which T is sharded, in parts of whole blocks; only the end of the
                    whole sequence may be padding. The state that comes back is that of the whole sequence.
    """
    inputs = Inputs(q, k, v, beta, log_decay)
    validate.inputs(inputs, cache_params, config, segment_ids, state, sequence_axis, learned)
    cache: dict[str, Any] = {"window": config.window, "block": config.block, "energy": config.read_energy}
    cache |= {"only_xla": config.only_xla, "rescored": config.rescored}
    batch, length = v.shape[:2]
    fresh = state is None
    work = kernels.work_of(q, k, v, channels=log_decay.ndim == 4, continued=not fresh, **cache)
    chosen = kernels.choose(implementation, work, sequence_axis)
    if check:
        validate.values(beta, log_decay, segment_ids, state, config, sequence_axis)
    if state is None:
        state = init_state(config, batch, v.shape[2], k.shape[3], v.shape[3], v.dtype, key_heads=k.shape[2])
    several = segment_ids is not None
    if segment_ids is None:
        documents = jnp.broadcast_to(jnp.maximum(state.document, 1)[:, None], (batch, length))
    else:
        documents = segment_ids.astype(jnp.int32)

    state = dataclasses.replace(state, config=config.meaning())
    if learned is not None:  # a score that is not finite comes from a value or a key that spoils its document anyway
        learned = jnp.where(jnp.isfinite(learned), learned, 0.0)
        if config.sparsity is not None:
            learned = held_down(config.sparsity, learned, documents > 0)
    if length == 1 and not fresh and sequence_axis is None and chosen.name != "reference":
        by_kernel = kernels.token_kernels(chosen.name, work)
        if by_kernel is not None:
            return by_kernels.one_token(by_kernel, inputs, cache_params, config, documents[:, 0], state)
        own = None if learned is None else learned[:, 0]
        return run_token(inputs, cache_params, config, documents[:, 0], state, own)
    run = kernels.kernels(chosen)
    if run is not None and run.hola is not None:  # where NaN stays in its document
        return run_piece(inputs, cache_params, config, documents, several, state, fresh, None, run)
    packed = documents if several else None
    gates, weights = (beta, log_decay), (state.fast_weights,)
    clear = poison.cleared(q, k, v, gates, weights, packed, state.document, sequence_axis, fresh=fresh)
    inputs = Inputs(clear.q, clear.k, clear.v, *clear.gates)
    state = dataclasses.replace(state, fast_weights=clear.states[0])
    if chosen.name == "reference":
        out, state = hola_reference(*inputs, cache_params, config, documents, state, learned)
    else:
        where = (documents, several, state, fresh, sequence_axis)
        out, state = run_piece(inputs, cache_params, config, *where, run, learned)
    fast_weights = poison.spoil(state.fast_weights, clear.spoilt_last)
    return poison.spoil(out, clear.spoilt), dataclasses.replace(state, fast_weights=fast_weights)
