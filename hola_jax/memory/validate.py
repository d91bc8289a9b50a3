"""What a memory refuses: shapes and types at trace time, values where `check=True` asks for it."""

from __future__ import annotations

from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from hola_jax.array_types import Array
from hola_jax.memory.state import CacheParams, MemoryConfig, MemoryState, Scan


def _is_float(name: str, x: Any) -> None:
    if not hasattr(x, "dtype") or not hasattr(x, "ndim"):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be an array")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {x.dtype}; it must be floating point (float32, bfloat16, ...)")


def _has_shape(name: str, x: Array, shape: tuple[int, ...], letters: str, origin: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; with {origin} it must be [{letters}] = {shape}")


def qkv(q: Array, k: Array, v: Array, beta: Array | None, log_decay: Array) -> None:
    """The arrays of a linear memory: ranks, types and agreement."""
    named = {"q": q, "k": k, "v": v, "log_decay": log_decay} | ({} if beta is None else {"beta": beta})
    for name, x in named.items():
        _is_float(name, x)
    for name, letters in (("q", "B T h K"), ("k", "B T h K"), ("v", "B T H V")):
        if named[name].ndim != 4:
            raise ValueError(f"{name} has shape {tuple(named[name].shape)}; it must have 4 axes [{letters}]")
    batch, length, heads, _ = v.shape
    if batch < 1 or length < 1:
        raise ValueError(f"v has shape {tuple(v.shape)}; it needs at least one row (B) and one token (T)")
    key_heads, key_dim = k.shape[2:]
    _has_shape("k", k, (batch, length, key_heads, key_dim), "B T h K", f"v {tuple(v.shape)}")
    _has_shape("q", q, tuple(k.shape), "B T h K", f"k {tuple(k.shape)}")
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"k has {key_heads} heads and v has {heads}; the key heads must divide the value heads")
    if beta is not None:
        _has_shape("beta", beta, (batch, length, heads), "B T H", f"v {tuple(v.shape)}")
    if log_decay.ndim == 4:
        _has_shape("log_decay", log_decay, (batch, length, heads, key_dim), "B T H K", f"v {tuple(v.shape)}")
    else:
        _has_shape("log_decay", log_decay, (batch, length, heads), "B T H", f"v {tuple(v.shape)}")


def segments(segment_ids: Array | None, batch: int, length: int) -> None:
    if segment_ids is None:
        return
    if not hasattr(segment_ids, "dtype") or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(
            f"segment_ids is {getattr(segment_ids, 'dtype', type(segment_ids).__name__)}; it must be integers"
        )
    _has_shape("segment_ids", segment_ids, (batch, length), "B T", f"{batch} rows of {length} tokens")


def chunks(chunk: int, scan: Scan) -> None:
    """Of memories whose chunk and scan are arguments and not part of a configuration."""
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"chunk is {chunk!r}; it must be an integer of at least 1")
    if scan not in get_args(Scan):
        raise ValueError(f"scan is {scan!r}; it must be one of {list(get_args(Scan))}")


def check_state(given: Any, kind: type, origin: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """A state belongs to the call that it is given to."""
    if not isinstance(given, kind):
        raise TypeError(f"state is a {type(given).__name__}; it must be a {kind.__name__} (see {origin}) or None")
    for name, shape in shapes.items():
        actual = tuple(getattr(given, name).shape)
        if actual != shape:
            raise ValueError(
                f"state.{name} has shape {actual}, but this call needs {shape}: "
                "the state belongs to another batch, model or config"
            )


def inputs(
    inputs: Any,
    params: CacheParams,
    config: MemoryConfig,
    segment_ids: Array | None,
    state: MemoryState | None,
    sequence_axis: str | None,
    learned: Array | None = None,
) -> None:
    """Everything that shapes and types can tell of a call of `hola_memory`."""
    if not isinstance(config, MemoryConfig):
        raise TypeError(f"config is a {type(config).__name__}; it must be a MemoryConfig")
    q, k, v, beta, log_decay = inputs
    qkv(q, k, v, beta, log_decay)
    batch, length, heads, value_dim = v.shape
    key_heads, key_dim = k.shape[2:]
    segments(segment_ids, batch, length)
    if not isinstance(params, CacheParams):
        raise TypeError(f"cache_params is a {type(params).__name__}; it must be a CacheParams")
    needed = ("query_scale", "key_scale") if config.read == "rmsnorm" else ("temperature",)
    needed = (*needed, "power") if config.read_power else needed
    sizes = {
        "query_scale": key_dim,
        "key_scale": key_dim,
        "temperature": heads,
        "sink_logit": heads,
        "gate_logit": heads,
        "power": heads,
    }
    for name in (*needed, "sink_logit", "gate_logit"):
        value = getattr(params, name)
        if value is None:
            raise ValueError(
                f"cache_params.{name} is None; {config.read_options} needs an array of {sizes[name]} numbers"
            )
        letter = "K" if sizes[name] == key_dim and name.endswith("scale") else "H"
        _has_shape(f"cache_params.{name}", value, (sizes[name],), letter, f"v {tuple(v.shape)} and k {tuple(k.shape)}")
    if (learned is None) == (config.score == "learned"):
        given = "not given" if learned is None else "given"
        raise ValueError(f"learned is {given} and the score is {config.score!r}; it belongs to score='learned' alone")
    if learned is not None:
        _is_float("learned", learned)
        _has_shape("learned", learned, (batch, length, heads), "B T H", f"v {tuple(v.shape)}")
    if sequence_axis is not None and length % config.block:
        raise ValueError(
            f"each device holds {length} tokens along mesh axis {sequence_axis!r}; "
            f"that must be a multiple of the block, {config.block}"
        )
    if state is None:
        return
    shapes = {
        "fast_weights": (batch, heads, key_dim, value_dim),
        "cache_keys": (batch, heads, config.window, key_dim),
        "cache_values": (batch, heads, config.window, value_dim),
        "block_keys": (batch, key_heads, config.block, key_dim),
        "block_values": (batch, heads, config.block, value_dim),
        "position": (batch,),
    }
    check_state(state, MemoryState, "init_state", shapes)
    if state.config != config.meaning():
        raise ValueError(f"state was made with {state.config}; this call has config {config.meaning()}")
    if state.cache_values.dtype != v.dtype:
        raise TypeError(f"state holds {state.cache_values.dtype} values and v is {v.dtype}; they must be one type")


def segment_values(segment_ids: Array | None, document: Array | None) -> None:
    """Segment ids are not negative and do not decrease from one real token to the next."""
    if segment_ids is None:
        return
    checkify.check(jnp.all(segment_ids >= 0), "segment_ids has a negative id; documents are 1, 2, ... and padding is 0")
    before = jax.lax.cummax(segment_ids, axis=1)
    grows = jnp.all((segment_ids == 0) | (segment_ids >= before))
    checkify.check(grows, "segment_ids decreases along a row; documents must stand in the order of their ids")
    if document is not None:
        first = jnp.min(jnp.where(segment_ids > 0, segment_ids, jnp.iinfo(segment_ids.dtype).max), axis=1)
        checkify.check(
            jnp.all(first >= document), "segment_ids begins with a document before the one that the state stands in"
        )


def decay_values(beta: Array | None, log_decay: Array) -> None:
    """beta in [0, 2], log decay at most 0; NaN passes, for it is the memory's to carry."""
    if beta is not None:
        checkify.check(~jnp.any((beta < 0) | (beta > 2)), "beta has an entry outside [0, 2]")
    checkify.check(~jnp.any(log_decay > 0), "log_decay has a positive entry; a decay is exp of at most 0")


def values(
    beta: Array,
    log_decay: Array,
    segment_ids: Array | None,
    state: MemoryState | None,
    config: MemoryConfig,
    sequence_axis: str | None,
) -> None:
    """What only the values can tell of a call of `hola_memory`; inside jit the caller functionalises it with checkify."""
    decay_values(beta, log_decay)
    segment_values(segment_ids, None if state is None else state.document)
    if sequence_axis is not None and state is not None:
        checkify.check(
            jnp.all(state.position % config.block == 0),
            "state stands inside a block; a sequence that is sharded over devices must begin at a block's start",
        )
