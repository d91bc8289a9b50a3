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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hola_jax.array_types import Array, Bool, Float, Int, Int32
from hola_jax.memory import kernels, poison, validate
from hola_jax.memory.align import align, to_places, to_tokens
from hola_jax.memory.cache_read import query_tiles
from hola_jax.memory.decay import document_before
from hola_jax.memory.delta_rule import HIGHEST
from hola_jax.memory.exact_cache import best_by_position
from hola_jax.memory.linear import documents_of
from hola_jax.memory.lola_state import LEAST_FEATURE, LEAST_MASS, LolaParams, LolaState, init_lola_state
from hola_jax.memory.reference_lola import lola_reference
from hola_jax.memory.state import EMPTY, MemoryConfig

ONLY_XLA = "LoLA scores its pairs anew at each block's end, which no kernel does"


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
    work = kernels.work_of(q, k, v, delta=False, only_xla=ONLY_XLA, rescored=True)
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


class Held(NamedTuple):
    """What a block finds of the pairs before it; all of them are of one document."""

    document: Int32[Array, " B"]
    associations: Float[Array, "B H E V"]
    mass: Float[Array, "B H E"]
    keys: Float[Array, "B H W K"]
    values: Float[Array, "B H W V"]
    positions: Int32[Array, "B H W"]


class Block(NamedTuple):
    keys: Float[Array, "B H C K"]
    values: Float[Array, "B H C V"]
    documents: Int32[Array, "B C"]  # 0 where there is no pair, or one that nobody sees again
    positions: Int32[Array, "B C"]


def features(x: Float[Array, "B H X K"], weights: Float[Array, "H K F"]) -> Float[Array, "B H X E"]:
    """phi(x) = [softmax(x W), softmax(-x W)]."""
    z = jnp.einsum("bhxk,hkf->bhxf", x.astype(jnp.float32), weights.astype(jnp.float32), precision=HIGHEST)
    both = jnp.concatenate([jax.nn.softmax(z, axis=-1), jax.nn.softmax(-z, axis=-1)], axis=-1)
    return jnp.maximum(both, LEAST_FEATURE)


def _chosen(which: Bool[Array, " B"], new: Held, old: Held) -> Held:
    return jax.tree.map(lambda a, b: jnp.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _of_document(held: Held, document: Int32[Array, " B"]) -> Held:
    """What is held of `document`: nothing where it is another."""
    empty = jax.tree.map(jnp.zeros_like, held)
    empty = empty._replace(document=document, positions=jnp.full_like(held.positions, EMPTY))
    return _chosen(held.document == document, held, empty)


def _merge(held: Held, block: Block, params: LolaParams) -> Held:
    """After a complete block: the pairs of its last document and the cache's compete, and who loses is absorbed."""
    held = _of_document(held, jnp.maximum(held.document, jnp.max(block.documents, axis=1)))
    heads, window = held.positions.shape[1:]

    def of_heads(x: Array) -> Array:
        return jnp.broadcast_to(x[:, None], (x.shape[0], heads, x.shape[1]))

    own = (block.documents == held.document[:, None]) & (block.documents > 0)
    competes = jnp.concatenate([held.positions != EMPTY, of_heads(own)], axis=-1)
    positions = jnp.concatenate([held.positions, of_heads(block.positions)], axis=-1)
    keys = jnp.concatenate([held.keys, block.keys], axis=2)
    values = jnp.concatenate([held.values, block.values], axis=2)
    phi = features(keys, params.key_features)
    error = _self_recall_error(*lax.stop_gradient((phi, values, held.associations, held.mass)))
    scores = jnp.where(competes, error, -jnp.inf)
    best, index = best_by_position(scores, positions, window)
    filled, kept_positions = best > -jnp.inf, jnp.take_along_axis(positions, index, axis=-1)
    leaves = competes
    if window:  # behind the last that stays: by comparison, for a scatter does not divide over the devices of a mesh
        least, last = best[..., -1:], kept_positions[..., -1:]
        leaves = leaves & ((scores < least) | ((scores == least) & (positions > last)))
    absorbed = jnp.where(leaves[..., None], phi, 0.0)
    take = jax.vmap(jax.vmap(lambda rows, at: rows[at]))
    written = jnp.einsum("bhxf,bhxv->bhfv", absorbed, values.astype(jnp.float32), precision=HIGHEST)
    return Held(
        held.document,
        held.associations + written,
        held.mass + jnp.sum(absorbed, axis=2),
        jnp.where(filled[..., None], take(keys, index), 0),
        jnp.where(filled[..., None], take(values, index), 0),
        jnp.where(filled, kept_positions, EMPTY),
    )


def _self_recall_error(
    phi: Float[Array, "B H X E"],
    values: Float[Array, "B H X V"],
    associations: Float[Array, "B H E V"],
    mass: Float[Array, "B H E"],
) -> Float[Array, "B H X"]:
    found = jnp.einsum("bhxf,bhfv->bhxv", phi, associations, precision=HIGHEST)
    share = jnp.einsum("bhxf,bhf->bhx", phi, mass, precision=HIGHEST) + LEAST_MASS
    error = jnp.linalg.norm(found / share[..., None] - values.astype(jnp.float32), axis=-1)
    return jnp.where(jnp.isfinite(error), error, 0.0)


def _of_stored(spec: str, stored: Array, other: Array) -> Array:
    """A product in the type of the stored rows, accumulated in float32."""
    other = other.astype(stored.dtype)
    return jnp.einsum(spec, stored, other, precision=HIGHEST, preferred_element_type=jnp.float32)


def _read(
    queries: Float[Array, "B H Q K"],
    documents: Int[Array, "B Q"],
    seen: Bool[Array, "B Q C"],
    held: Held,
    block: Block,
    params: LolaParams,
) -> Float[Array, "B H Q V"]:
    """The three stores under one normaliser, float32; `seen` of the block."""
    continues = documents == held.document[:, None]
    cached = (held.positions != EMPTY)[:, :, None] & continues[:, None, :, None]
    in_block = jnp.broadcast_to(seen[:, None], (*cached.shape[:3], seen.shape[2]))
    stores = ((held.keys, cached), (block.keys, in_block))
    logits = [jnp.where(mask, _of_stored("bhxk,bhqk->bhqx", keys, queries), -jnp.inf) for keys, mask in stores]
    logits = jnp.concatenate(logits, axis=-1) * queries.shape[-1] ** -0.5
    # All is times e^-shift, above and below: the absorbed pairs' part and the 1e-6, too. Below 0 it could overflow there.
    shift = lax.stop_gradient(jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), 0.0))
    mix = jax.nn.sigmoid(params.mix_logit.astype(jnp.float32))[:, None, None]
    exact = mix * jnp.exp(logits - shift)
    absorbed = (1 - mix) * jnp.exp(-shift) * features(queries, params.query_features)
    absorbed = jnp.where(continues[:, None, :, None], absorbed, 0.0)
    of_cache, of_block = jnp.split(exact, [held.keys.shape[2]], axis=-1)
    above = _of_stored("bhxv,bhqx->bhqv", held.values, of_cache) + _of_stored("bhxv,bhqx->bhqv", block.values, of_block)
    above = above + jnp.einsum("bhqf,bhfv->bhqv", absorbed, held.associations, precision=HIGHEST)
    below = jnp.sum(exact, axis=-1) + jnp.einsum("bhqf,bhf->bhq", absorbed, held.mass, precision=HIGHEST)
    return above / (below[..., None] + LEAST_MASS * jnp.exp(-shift))


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
        occupied, tail = place < fill[:, None], [(0, 0), (0, length - size), (0, 0), (0, 0)]
        running = (jnp.pad(x.swapaxes(1, 2), tail) for x in (state.block_keys, state.block_values))
        k, v = (jnp.where(occupied[..., None, None], old, x) for old, x in zip(running, (k, v), strict=True))
        alive = jnp.where(positions >= state.document_start[:, None], state.document[:, None], 0)
        documents = jnp.where(occupied, alive, own)
    count = jnp.sum(own > 0, axis=1, dtype=jnp.int32)
    whole = (fill + count) // size

    def by_block(x: Array) -> Array:
        x = x.reshape(batch, length // size, size, *x.shape[2:]).swapaxes(0, 1)
        return x.swapaxes(2, 3) if x.ndim == 5 else x

    blocks = Block(*map(by_block, (k, v, documents, positions)))

    def step(held: Held, numbered: tuple[Array, Block]) -> tuple[Held, Held]:
        number, block = numbered
        return _chosen(number < whole, _merge(held, block, params), held), held

    @jax.checkpoint  # logits are made again backward: all of them would be W + C numbers a token and head
    def read(given: tuple[Array, Array, Block, Held]) -> Array:
        queries, own, block, held = given
        seen = (
            (own[:, :, None] == block.documents[:, None])
            & (own > 0)[..., None]
            & jnp.tril(jnp.ones((size, size), bool))
        )

        def of_tile(tile: slice) -> Array:  # the block as far as the tile's last query sees it
            visible = block._replace(keys=block.keys[:, :, : tile.stop], values=block.values[:, :, : tile.stop])
            return _read(queries[:, :, tile], own[:, tile], seen[:, tile, : tile.stop], held, visible, params)

        return jnp.concatenate([of_tile(tile) for tile in query_tiles(size)], axis=2)

    numbers = jnp.arange(length // size)
    last, found = lax.scan(jax.checkpoint(step), _held(state), (numbers, blocks))
    out = lax.map(read, (by_block(q), by_block(own), blocks, found))
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
    of_document = jnp.sum((own == document[:, None]) & (own > 0), axis=1, dtype=jnp.int32)
    start = jnp.where(document == state.document, state.document_start, position - of_document)

    def running(x: Float[Array, "n B H C X"]) -> Float[Array, "B H C X"]:
        """The block that `position` points into; zero behind it."""
        rows = x[jnp.minimum(whole, x.shape[0] - 1), jnp.arange(x.shape[1])]
        filled = jnp.arange(size) < (position % size)[:, None]
        return jnp.where(filled[:, None, :, None], rows, 0)

    keys, values = running(blocks.keys), running(blocks.values)
    return _state(_of_document(held, document), keys, values, position, start, state)


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
    held = lax.cond(jnp.any(new), lambda held: _of_document(held, now), lambda held: held, held)
    fill = state.position % size
    row, slot = jnp.arange(real.shape[0]), jnp.where(real, fill, size)  # a slot behind the block is dropped
    keys = state.block_keys.at[row, :, slot].set(tokens.k[:, 0], mode="drop")
    values = state.block_values.at[row, :, slot].set(tokens.v[:, 0], mode="drop")
    positions = (state.position - fill)[:, None] + jnp.arange(size, dtype=jnp.int32)
    seen = (positions <= state.position[:, None]) & (positions >= start[:, None])
    block = Block(keys, values, jnp.where(seen, now[:, None], 0), positions)
    out = _read(tokens.q.swapaxes(1, 2), tokens.documents, seen[:, None], held, block, params)
    complete = real & (fill == size - 1)

    def merged(held: Held, keys: Array, values: Array) -> tuple[Held, Array, Array]:
        ends = complete[:, None, None, None]
        after = _chosen(complete, _merge(held, block, params), held)
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
