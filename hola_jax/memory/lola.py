"""LoLA's memory: three stores of pairs under one normaliser, for a whole sequence, a piece of one, or one token.

    running block   the last pairs, exact
    cache           at most W earlier pairs, exact: those that the third store would give back worst
    H, s            all other pairs of the document, added up: H += phi(k) v', s += phi(k)

A pair is in one of them. When a block of C tokens is complete, its pairs and the cache's are scored by the self-recall error
|phi(k)' H / (phi(k)' s + 1e-6) - v|; the W largest stay and the others are absorbed for good. So blocks are ranked one after
the other. What each block finds is carried through a scan over blocks, and the reads of all blocks follow. Gradients
flow through H, s and the exact pairs, none through the choice.

`reference_lola` has the same token by token.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Float, Int, Int32
from hola_jax.memory import kernels, poison, validate
from hola_jax.memory.align import align, behind_running_block, to_places, to_tokens
from hola_jax.memory.cache_read import query_tiles
from hola_jax.memory.decay import document_before
from hola_jax.memory.linear import documents_of
from hola_jax.memory.lola_state import LolaParams, LolaState, init_lola_state
from hola_jax.memory.lola_stores import Block, Held, merge, of_document, read
from hola_jax.memory.reference_lola import lola_reference
from hola_jax.memory.state import MemoryConfig, select

RESCORED = "LoLA scores its pairs anew at each block's end"
ONLY_XLA = f"{RESCORED}, which no kernel does"


def lola_memory(
    q: Array,
    k: Array,
    v: Array,
    params: LolaParams,
    *,
    config: MemoryConfig,
    segment_ids: Array | None = None,
    state: LolaState | None = None,
    implementation: kernels.Implementation | None = None,
    check: bool = False,
    sequence_axis: str | None = None,
) -> tuple[Array, LolaState]:
    """What the memory answers to each token, and the memory after the last: ([B, T, H, V] in v's type, LolaState).

    q, k [B, T, H, K] and v [B, T, H, V] come as they are multiplied: rotated, where positions count. `config` gives window
    and block. Any T >= 1; one token with a state takes the decoding path. The other arguments are as in `hola_memory`. A
    sequence cannot be sharded, since what a block finds depends on all the blocks before it.
    """
    _check_call(q, k, v, params, config, segment_ids, state)
    batch, length, heads, value_dim = v.shape
    work = kernels.work_of(q, k, v, delta=False, only_xla=ONLY_XLA, rescored=RESCORED)
    chosen = kernels.choose(implementation, work, sequence_axis).name
    fresh = state is None
    if state is None:
        state = init_lola_state(config, batch, heads, k.shape[3], value_dim, params.key_features.shape[2], v.dtype)
    if check:
        validate.segment_values(segment_ids, None if fresh else state.document)
    several, documents, document = documents_of(segment_ids, state.document, length)
    (q,), bad_query = poison.finite_together(q)
    (k, v), bad = poison.finite_together(k, v)
    real = (documents > 0)[..., None]
    spoilt = poison.spoilt_since(bad & real, several, state.spoilt, document)
    tokens = Tokens(q, k, v, documents)
    if chosen == "reference":
        out, state = lola_reference(q, k, v, params, config, documents, state)
    elif length == 1 and not fresh:
        out, state = _token(tokens, params, config, state)
    else:
        out, state = _piece(tokens, params, config, state, fresh)
    out = poison.spoil(out, (spoilt | bad_query) & real)
    return out.astype(v.dtype), dataclasses.replace(state, spoilt=spoilt[:, -1])


def document_positions(documents: Int[Array, "B T"], state: LolaState) -> Int32[Array, "B T"]:
    """Where each token stands in its document, which may have begun in `state`; real tokens alone count."""
    real = documents > 0
    position = state.position[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    begins = real & (documents != document_before(documents, state.document)[:, :-1])
    start = lax.cummax(jnp.where(begins, position, state.document_start[:, None]), axis=1)
    return position - start


class Tokens(NamedTuple):
    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]
    documents: Int[Array, "B T"]


def _held(state: LolaState) -> Held:
    names = ("document", "associations", "mass", "cache_keys", "cache_values", "cache_positions")
    return Held(*(getattr(state, name) for name in names))


def _piece(
    tokens: Tokens, params: LolaParams, config: MemoryConfig, state: LolaState, fresh: bool
) -> tuple[Float[Array, "B T H V"], LolaState]:
    """Any number of tokens at once."""
    size, fill = config.block, state.position % config.block
    alignment = align(tokens.documents, fill, size, may_be_filled=not fresh)
    q, k, v = (to_places(x, alignment) for x in tokens[:3])
    own = to_places(tokens.documents[..., None], alignment)[..., 0]
    batch, length, heads, _ = v.shape
    place = jnp.arange(length, dtype=jnp.int32)
    positions = (state.position - fill)[:, None] + place
    documents = own
    if not fresh:  # the running block's pairs in front
        k, v, documents = behind_running_block(k, v, own, state, fill)
    count = jnp.sum(own > 0, axis=1, dtype=jnp.int32)
    whole = (fill + count) // size

    def by_block(x: Array) -> Array:
        x = x.reshape(batch, length // size, size, *x.shape[2:]).swapaxes(0, 1)
        return x.swapaxes(2, 3) if x.ndim == 5 else x

    blocks = Block(*map(by_block, (k, v, documents, positions)))

    def step(held: Held, numbered: tuple[Array, Block]) -> tuple[Held, Held]:
        number, block = numbered
        return select(number < whole, merge(held, block, params), held), held

    # Logits are made again backward: all of them would be W + C numbers a token and head.
    @partial(jax.checkpoint, prevent_cse=False)
    def read_block(given: tuple[Array, Array, Block, Held]) -> Array:
        queries, own, block, held = given
        causal = jnp.tril(jnp.ones((size, size), bool))
        seen = (own[:, :, None] == block.documents[:, None]) & (own > 0)[..., None] & causal

        def of_tile(tile: slice) -> Array:  # the block as far as the tile's last query sees it
            visible = block._replace(keys=block.keys[:, :, : tile.stop], values=block.values[:, :, : tile.stop])
            return read(queries[:, :, tile], own[:, tile], seen[:, tile, : tile.stop], held, visible, params)

        return jnp.concatenate([of_tile(tile) for tile in query_tiles(size)], axis=2)

    numbers = jnp.arange(length // size)
    last, found = lax.scan(jax.checkpoint(step, prevent_cse=False), _held(state), (numbers, blocks))
    out = lax.map(read_block, (by_block(q), by_block(own), blocks, found))
    out = jnp.where(own[..., None, None] > 0, out.transpose(1, 0, 3, 2, 4).reshape(batch, length, heads, -1), 0.0)
    return to_tokens(out, alignment), _state_after(last, blocks, own, whole, count, state)


def _state_after(
    held: Held,
    blocks: Block,
    own: Int32[Array, "B L"],
    whole: Int32[Array, " B"],
    count: Int32[Array, " B"],
    state: LolaState,
) -> LolaState:
    """The memory after `count` more tokens, which completed `whole` blocks."""
    size = blocks.documents.shape[2]
    position, document = state.position + count, jnp.maximum(state.document, jnp.max(own, axis=1))
    in_document = jnp.sum((own == document[:, None]) & (own > 0), axis=1, dtype=jnp.int32)
    start = jnp.where(document == state.document, state.document_start, position - in_document)

    def running(x: Float[Array, "n B H C X"]) -> Float[Array, "B H C X"]:
        """The block that `position` points into; zero behind it."""
        rows = x[jnp.minimum(whole, x.shape[0] - 1), jnp.arange(x.shape[1])]
        filled = jnp.arange(size) < (position % size)[:, None]
        return jnp.where(filled[:, None, :, None], rows, 0)

    keys, values = running(blocks.keys), running(blocks.values)
    return _state(of_document(held, document), keys, values, position, start, state)


def _state(
    held: Held, block_keys: Array, block_values: Array, position: Array, start: Array, before: LolaState
) -> LolaState:
    return dataclasses.replace(
        before,
        associations=held.associations,
        mass=held.mass,
        cache_keys=held.keys,
        cache_values=held.values,
        cache_positions=held.positions,
        block_keys=block_keys,
        block_values=block_values,
        position=position,
        document=held.document,
        document_start=start,
    )


def _token(
    tokens: Tokens, params: LolaParams, config: MemoryConfig, state: LolaState
) -> tuple[Float[Array, "B 1 H V"], LolaState]:
    """One token of every row: the decoding path; padding changes nothing."""
    document, size = tokens.documents[:, 0].astype(jnp.int32), config.block
    real = document > 0
    new = real & (document != state.document)
    start = jnp.where(new, state.position, state.document_start)
    held, now = _held(state), jnp.where(real, document, state.document)
    held = lax.cond(jnp.any(new), lambda held: of_document(held, now), lambda held: held, held)
    fill = state.position % size
    row, slot = jnp.arange(real.shape[0]), jnp.where(real, fill, size)  # a slot behind the block is dropped
    keys = state.block_keys.at[row, :, slot].set(tokens.k[:, 0], mode="drop")
    values = state.block_values.at[row, :, slot].set(tokens.v[:, 0], mode="drop")
    positions = (state.position - fill)[:, None] + jnp.arange(size, dtype=jnp.int32)
    seen = (positions <= state.position[:, None]) & (positions >= start[:, None])
    block = Block(keys, values, jnp.where(seen, now[:, None], 0), positions)
    out = read(tokens.q.swapaxes(1, 2), tokens.documents, seen[:, None], held, block, params)
    complete = real & (fill == size - 1)

    def merged(held: Held, keys: Array, values: Array) -> tuple[Held, Array, Array]:
        ends = complete[:, None, None, None]
        after = select(complete, merge(held, block, params), held)
        return after, jnp.where(ends, 0, keys), jnp.where(ends, 0, values)

    held, keys, values = lax.cond(jnp.any(complete), merged, lambda *given: given, held, keys, values)
    out = jnp.where(real[:, None, None, None], out.swapaxes(1, 2), 0.0)
    return out, _state(held, keys, values, state.position + real, start, state)


def _check_call(
    q: Array,
    k: Array,
    v: Array,
    params: LolaParams,
    config: MemoryConfig,
    segment_ids: Array | None,
    state: LolaState | None,
) -> None:
    """Everything that shapes and types can tell."""
    if not isinstance(config, MemoryConfig):
        raise TypeError(f"config is a {type(config).__name__}; it must be a MemoryConfig")
    validate.qkv(q, k, v, None, v[..., 0] if getattr(v, "ndim", 0) == 4 else v)  # there is no log_decay to look at
    batch, length, heads, value_dim = v.shape
    if k.shape[2] != heads:
        raise ValueError(f"k has {k.shape[2]} heads and v has {heads}; LoLA has as many key heads as value heads")
    validate.segments(segment_ids, batch, length)
    if not isinstance(params, LolaParams):
        raise TypeError(f"params is a {type(params).__name__}; it must be a LolaParams")
    width, key_dim = params.key_features.shape[-1], k.shape[3]
    wanted = {"query_features": (heads, key_dim, width), "key_features": (heads, key_dim, width), "mix_logit": (heads,)}
    for name, shape in wanted.items():
        if getattr(params, name).shape != shape:
            raise ValueError(
                f"params.{name} has shape {getattr(params, name).shape}; with k {k.shape} it must be {shape}"
            )
    if state is None:
        return
    sizes = {
        "associations": (batch, heads, 2 * width, value_dim),
        "cache_keys": (batch, heads, config.window, key_dim),
        "cache_values": (batch, heads, config.window, value_dim),
        "block_keys": (batch, heads, config.block, key_dim),
        "block_values": (batch, heads, config.block, value_dim),
        "position": (batch,),
    }
    validate.check_state(state, LolaState, "init_lola_state", sizes)
