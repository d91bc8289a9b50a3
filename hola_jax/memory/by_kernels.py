"""The phases of `piece` by a platform's kernels: all in one, or the state path in one and merge and read in another; and
one token in one kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from hola_jax.array_types import Array, Float, Int, Int32
from hola_jax.memory.align import Inputs, Piece
from hola_jax.memory.by_xla import Kept
from hola_jax.memory.delta_rule import Affine, DeltaRuleResult, Magnitude, act
from hola_jax.memory.exact_cache import magnitude_kind, token_scores
from hola_jax.memory.kernels import Kernels, divided
from hola_jax.memory.poison import finite_together
from hola_jax.memory.scan import axis_scan
from hola_jax.memory.state import CacheParams, MemoryConfig, MemoryState
from hola_jax.memory.token import run_token
from pallas_kernels.cache import Cache
from pallas_kernels.hola import Earlier, Hola, Learned
from pallas_kernels.step import Memory

TOKENS, ROWS, WHOLE = P(None, None, "heads"), P(None, "heads"), P()  # [B, T, H, ..], [B, H, ..], not by head


def delta_rule(
    kernels: Kernels,
    q: Float[Array, "B T h K"],
    k: Float[Array, "B T h K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
    *,
    scale: float,
    normalise: bool,
    documents: Int[Array, "B T"] | None,
    initial: Float[Array, "B H K V"] | None,
    initial_document: Int[Array, " B"],
    magnitude: Magnitude | None,
    out_dtype: DTypeLike,
    sequence_axis: str | None = None,
) -> DeltaRuleResult:
    """As `delta_rule.delta_rule`, which joins chunks by XLA; `normalise` brings keys and queries to unit length."""

    def run(v: Array, initial: Array | None, magnitude: Magnitude | None = None) -> DeltaRuleResult:
        def call(q: Any, k: Any, v: Any, beta: Any, decay: Any, documents: Any, initial: Any, before: Any) -> Any:
            return DeltaRuleResult(
                *kernels.delta_rule(
                    q,
                    k,
                    v,
                    beta,
                    decay,
                    scale=scale,
                    normalise=normalise,
                    documents=documents,
                    initial=initial,
                    initial_document=before,
                    magnitude=magnitude,
                    out_dtype=out_dtype,
                    interpret=kernels.interpret,
                )
            )

        in_specs = (*[TOKENS] * 5, WHOLE, ROWS, WHOLE)
        out_specs = DeltaRuleResult(TOKENS, None if magnitude is None else TOKENS, ROWS)  # type: ignore[arg-type]
        gates = (x.astype(jnp.float32) for x in (beta, log_decay))
        result: DeltaRuleResult = divided(call, in_specs, out_specs)(
            q, k, v, *gates, documents, initial, initial_document
        )
        return result

    if sequence_axis is None:
        return run(v, initial, magnitude)
    assert initial is not None
    # What this device's tokens do to a state, S -> A S + B: B is what they make of nothing, A, without values, of I.
    identity = jnp.broadcast_to(jnp.eye(k.shape[3], dtype=jnp.float32), (*initial.shape[:3], k.shape[3]))
    linear = run(jnp.zeros((*v.shape[:3], k.shape[3]), v.dtype), identity).final
    element = Affine(linear, run(v, jnp.zeros_like(initial)).final)
    before, last = axis_scan(act, element, initial, sequence_axis)
    return run(v, before, magnitude)._replace(final=last)


def state_path(
    kernels: Kernels,
    piece: Piece,
    config: MemoryConfig,
    initial: Float[Array, "B H K V"] | None,
    document: Int32[Array, " B"],
    axis: str | None,
) -> DeltaRuleResult:
    """As `by_xla.state_path`, in chunks of the kernel's own."""
    return delta_rule(
        kernels,
        *piece.inputs,
        scale=config.scale(piece.inputs.k.shape[-1]),
        normalise=True,
        documents=piece.own if piece.several else None,
        initial=initial,
        initial_document=document,
        magnitude=magnitude_kind(config),
        out_dtype=jnp.float32,
        sequence_axis=axis,
    )


def read_blocks(
    kernels: Kernels,
    piece: Piece,
    scores: Float[Array, "B H L"],
    positions: Int32[Array, "B L"],
    whole: Int32[Array, " B"],
    params: CacheParams,
    config: MemoryConfig,
    state: MemoryState,
) -> tuple[Float[Array, "B L H V"], Kept]:
    """As `by_xla.read_blocks`."""
    document = state.document if piece.several else jnp.max(piece.documents, axis=1)
    cache = Cache(state.cache_keys, state.cache_values, state.cache_scores, state.cache_positions, document)

    def call(
        queries: Any,
        keys: Any,
        values: Any,
        scores: Any,
        sink: Any,
        cache: Cache,
        documents: Any,
        start: Any,
        whole: Any,
    ) -> tuple[Array, Cache]:
        options: dict[str, Any] = {"window": config.window, "block": config.block, "out_dtype": jnp.float32}
        options["energy"] = config.read_energy
        given = {"documents": documents, "start": start, "whole": whole}
        out, after, _ = kernels.cached_read(
            queries, keys, values, scores, sink, cache, **given, **options, interpret=kernels.interpret
        )
        return out, after

    rows = Cache(ROWS, ROWS, ROWS, ROWS, WHOLE)
    in_specs = (TOKENS, TOKENS, TOKENS, ROWS, P("heads"), rows, WHOLE, WHOLE, WHOLE)
    documents = piece.documents if piece.several else None
    given = (piece.queries, piece.keys, piece.values, scores, params.sink_logit, cache)
    out, after = divided(call, in_specs, (TOKENS, rows))(*given, documents, positions[:, 0], whole)
    return out, Kept(*after)


def in_one(
    kernels: Kernels,
    piece: Piece,
    positions: Int32[Array, "B L"],
    whole: Int32[Array, " B"],
    params: CacheParams,
    config: MemoryConfig,
    state: MemoryState,
    fresh: bool,
) -> tuple[Float[Array, "B L H V"], Float[Array, "B H L"], Float[Array, "B H K V"], Kept]:
    """(outputs, scores, S after the piece, the cache that it leaves), by kernels that have one for all."""
    assert kernels.hola is not None
    fused, inputs = kernels.hola, piece.inputs
    document = state.document if piece.several else jnp.max(piece.documents, axis=1)
    magnitude = magnitude_kind(config)
    given = None
    if magnitude is None:
        beta = finite_together(inputs.beta, inputs.log_decay)[0][0]
        given = token_scores(config, None, piece.values, beta, positions).swapaxes(1, 2)
    earlier = None
    if not fresh:
        cache = Cache(state.cache_keys, state.cache_values, state.cache_scores, state.cache_positions, document)
        running = (state.block_keys, state.block_values, state.block_scores)
        earlier = Earlier(state.fast_weights, cache, *running, state.position % config.block)

    def call(inputs: Any, learned: Any, earlier: Any, given: Any, documents: Any, start: Any, whole: Any) -> Hola:
        found: Hola = fused(
            *inputs,
            learned,
            earlier,
            scale=config.scale(inputs.k.shape[-1]),
            window=config.window,
            block=config.block,
            score=magnitude if given is None else given,
            read=config.read,
            energy=config.read_energy,
            documents=documents,
            start=start,
            whole=whole,
            interpret=kernels.interpret,
        )
        return found

    rows = Cache(ROWS, ROWS, ROWS, ROWS, WHOLE)
    held = None if earlier is None else Earlier(ROWS, rows, ROWS, ROWS, ROWS, WHOLE)  # type: ignore[arg-type]
    in_specs = (TOKENS, P("heads"), held, ROWS, WHOLE, WHOLE, WHOLE)
    documents = piece.documents if piece.several else None
    run = divided(call, in_specs, Hola(TOKENS, ROWS, ROWS, rows))  # type: ignore[arg-type]
    learned = _learned(inputs, params, config)
    found = run(inputs, learned, earlier, given, documents, positions[:, 0], whole)
    kept = found.cache if piece.several else found.cache._replace(document=document)
    return found.out, found.scores, found.state, Kept(*kept)


def one_token(
    kernels: Kernels,
    inputs: Inputs,
    params: CacheParams,
    config: MemoryConfig,
    document: Int32[Array, " B"],
    state: MemoryState,
) -> tuple[Array, MemoryState]:
    """As `token.run_token`, through which its gradient goes. For what `kernels.token_kernels` gives kernels for."""
    assert kernels.step is not None
    token = kernels.step
    magnitude = magnitude_kind(config)

    def call(inputs: Any, learned: Any, memory: Any, given: Any, document: Any) -> Any:
        return token(
            *inputs,
            learned,
            memory,
            document,
            scale=config.scale(inputs.k.shape[-1]),
            score=magnitude if given is None else given,
            read=config.read,
            energy=config.read_energy,
            interpret=kernels.interpret,
        )

    @jax.custom_vjp
    def step(inputs: Inputs, params: CacheParams, state: MemoryState) -> tuple[Array, MemoryState]:
        given, one = None, Inputs(*(x[:, 0] for x in inputs))
        if magnitude is None:
            given = token_scores(config, None, one.v, one.beta, state.position)
        memory = Memory(*(getattr(state, name) for name in Memory._fields))
        by_head = P(None, "heads")
        rows = Memory(*[by_head] * 8, *[WHOLE] * 3)  # type: ignore[arg-type]
        run = divided(call, (by_head, P("heads"), rows, by_head, WHOLE), (by_head, rows))
        out, after = run(one, _learned(inputs, params, config), memory, given, document)
        return out[:, None], dataclasses.replace(state, **after._asdict())

    def through_xla(given: Any, cotangents: Any) -> Any:
        def same(inputs: Inputs, params: CacheParams, state: MemoryState) -> tuple[Array, MemoryState]:
            return run_token(inputs, params, config, document, state)

        return jax.vjp(same, *given)[1](cotangents)

    step.defvjp(lambda *given: (step(*given), given), through_xla)
    result: tuple[Array, MemoryState] = step(inputs, params, state)
    return result


def _learned(inputs: Inputs, params: CacheParams, config: MemoryConfig) -> Learned:
    """What the read learns, by head."""
    heads, key_heads, key_dim = inputs.v.shape[2], *inputs.k.shape[2:]
    if config.read == "rmsnorm":
        assert params.query_scale is not None and params.key_scale is not None
        query, key = params.query_scale * key_dim**-0.5, params.key_scale
    else:
        assert params.temperature is not None
        query, key = params.temperature[:, None], jnp.ones(key_dim)
    query, key = jnp.broadcast_to(query, (heads, key_dim)), jnp.broadcast_to(key, (key_heads, key_dim))
    gate = jax.nn.sigmoid(params.gate_logit.astype(jnp.float32))
    return Learned(query, key, params.sink_logit, gate)
