"""`hola_memory` with the fused kernel in place of its phases: what the library has to do around the kernel, and no more."""

import dataclasses

import jax
import jax.numpy as jnp

from hola_jax.memory.exact_cache import magnitude_kind, token_scores
from hola_jax.memory.piece import Kept, _state_after
from pallas_kernels.cache import Cache
from pallas_kernels.hola import Earlier, Learned, hola


def fused_phases(piece, params, config, state, fresh, axis, implementation):
    """In the place of `hola_jax.memory.piece._phases`."""
    assert axis is None
    inputs, block = piece.inputs, config.block
    length, heads, key_dim = *inputs.v.shape[1:3], inputs.k.shape[3]
    count = jnp.sum(piece.own > 0, axis=1, dtype=jnp.int32)
    fill = state.position % block
    start = state.position - fill
    whole = (state.position + count - start) // block
    positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)
    score = magnitude_kind(config)
    if score is None:
        score = token_scores(config, None, inputs.v, inputs.beta, positions).swapaxes(1, 2)
    if config.read == "rmsnorm":
        scales = params.query_scale * key_dim**-0.5, params.key_scale
    else:
        scales = jnp.broadcast_to(params.temperature[:, None], (heads, key_dim)), jnp.ones(key_dim)
    document = state.document if piece.several else jnp.max(piece.documents, axis=1)
    earlier = None
    if not fresh:
        cache = state.cache_keys, state.cache_values, state.cache_scores, state.cache_positions, document
        running = state.block_keys, state.block_values, state.block_scores
        earlier = Earlier(state.fast_weights, Cache(*cache), *running, fill)
    found = hola(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.beta,
        inputs.log_decay,
        Learned(*scales, params.sink_logit, jax.nn.sigmoid(params.gate_logit)),
        earlier,
        scale=config.scale(key_dim),
        window=config.window,
        block=block,
        score=score,
        read=config.read,
        documents=piece.documents if piece.several else None,
        start=start,
        whole=whole,
        interpret=True,
    )
    cache = found.cache if piece.several else found.cache._replace(document=document)
    after = _state_after(piece, found.scores, positions, Kept(*cache), whole, count, config, state)
    return found.out, dataclasses.replace(after, fast_weights=found.state)
