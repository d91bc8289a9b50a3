"""The language model: embed, a scanned stack of blocks, norm, head. Every mixer goes through the same code.

Parameters of the blocks are stacked on a leading axis N, and one `lax.scan` runs over them, so a program is as long for
24 layers as for one. States are stacked likewise and are arguments and results, never variables of a module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental import checkify

from hola_jax.array_types import Array, Float, Int
from hola_jax.config import ModelConfig
from hola_jax.layers import MIXERS
from hola_jax.layers.init import named_key, normal
from hola_jax.layers.linear import Linear
from hola_jax.layers.mlp import SwiGLU
from hola_jax.layers.norm import norm_of
from hola_jax.layers.residuals import MIXER, MLP, Plain, Read, Residual, attend_over_depth
from hola_jax.memory.align import align, to_places, to_tokens

Params = dict[str, Any]  # nested, of arrays
State = Any  # a mixer's state, each array with a leading axis N
PLAIN = Plain()


class Block(nnx.Module):
    """Two sub-layers, mixer(norm x) and SwiGLU(norm x), joined by a residual rule; where it is plain, x += each of them.
    With the state afterwards, or what the mixer's `commit` makes it of."""

    def __init__(self, config: ModelConfig, key: Array) -> None:
        self.config = config
        self.mixer_norm = norm_of(config)
        self.mixer = MIXERS[config.mixer](config, named_key(key, "mixer"))
        self.mlp_norm = norm_of(config)
        self.mlp = SwiGLU(config, named_key(key, "mlp"))
        sandwich = config.norm == "sandwich"
        self.mixer_answer_norm = norm_of(config) if sandwich else None
        self.mlp_answer_norm = norm_of(config) if sandwich else None
        plain = config.residual == "plain"
        self.mixer_read = None if plain else Read(config)
        self.mlp_read = None if plain else Read(config)

    def mix(
        self, x: Float[Array, "B T D"], segment_ids: Array | None, state: State, sequence_axis: str | None
    ) -> tuple[Float[Array, "B T D"], State]:
        """The first sub-layer."""
        call = getattr(self.mixer, "answer", self.mixer)
        if self.config.qk_norm == "input":
            call = partial(call, values_of=x)
        y, after = call(self.mixer_norm(x), segment_ids, state, sequence_axis=sequence_axis)
        return y if self.mixer_answer_norm is None else self.mixer_answer_norm(y), after

    def feed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The second."""
        y = self.mlp(self.mlp_norm(x))
        return y if self.mlp_answer_norm is None else self.mlp_answer_norm(y)

    def __call__(
        self,
        x: Array,
        segment_ids: Int[Array, "B T"] | None = None,
        state: State = None,
        *,
        sequence_axis: str | None = None,
        residual: Residual = PLAIN,
    ) -> tuple[Array, State]:
        y, after = self.mix(residual.read(x, MIXER), segment_ids, state, sequence_axis)
        x = residual.add(x, y, MIXER)
        return residual.add(x, self.feed(residual.read(x, MLP)), MLP), after


# Is given each layer's block before it runs, may put other calls in the place of its own, and gives a call that tells what
# those saw.
Watch = Callable[[Block], Callable[[], Any]]


def stacked_blocks(config: ModelConfig, key: Array) -> Block:
    """A block whose every parameter has a leading axis N, one layer to an entry."""
    structure = nnx.graphdef(nnx.eval_shape(lambda: Block(config, key)))
    keys = jax.vmap(lambda layer: jax.random.fold_in(key, layer))(jnp.arange(config.layers))
    params = jax.jit(jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(Block(config, key)))))(keys)
    return nnx.merge(structure, params)


GATHERED = (
    "gathered parameters"  # the name (jax.ad_checkpoint) of what `gather` makes: the backward pass makes it again
)


def _remat(body: Callable[..., Any], name: str, gathers: bool) -> Callable[..., Any]:
    if name == "none" and not gathers:
        return body
    policies = {
        "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
        "full": None,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    return jax.checkpoint(body, policy=policies[name], prevent_cse=False)


class LanguageModel(nnx.Module):
    """Tokens to logits. `model(tokens)` for a whole sequence; `model(tokens, state=state)` continues one, by any number
    of tokens. For training and for decoding in a loop, `functional(model)` gives what `jax.jit` wants."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        if not isinstance(config, ModelConfig):
            raise TypeError(f"config is a {type(config).__name__}; it must be a ModelConfig (see hola_jax.preset)")
        key = jax.random.key(seed)
        self.config = config
        self.embedding = nnx.Param(normal(named_key(key, "embedding"), config.vocab_size, config.dim))
        self.blocks = stacked_blocks(config, named_key(key, "blocks"))
        self.read = None if config.residual == "plain" else Read(config)
        self.norm = norm_of(config)
        untied = not config.tie_embeddings
        self.unembedding = Linear(config.dim, config.vocab_size, named_key(key, "unembedding")) if untied else None

    def init_state(self, batch: int) -> State:
        """What an empty prefix leaves, for every layer."""
        return init_state(self.config, batch)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State = None,
        *,
        sequence_axis: str | None = None,
        gather: Callable[[Params], Params] | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        """What `head` turns into logits, and the state after the last token. Zero at padding.

        gather: inside shard_map, makes the whole parameters of a layer of this device's part of them, a layer at a time
        """
        _check_call(self.config, tokens, segment_ids, state)
        alignment = None
        if segment_ids is not None and tokens.shape[1] > 1 and sequence_axis is None:
            # Real tokens first: then padding, wherever it stood, is the same to every layer.
            documents = segment_ids.astype(jnp.int32)
            alignment = align(documents, jnp.zeros(tokens.shape[0], jnp.int32), 1, may_be_filled=False)
            tokens, segment_ids = to_places(tokens, alignment), to_places(documents, alignment)
        x, state, _ = self._through_blocks(self._embedded(tokens), segment_ids, state, sequence_axis, gather)
        x = self.norm(x)
        return (x if alignment is None else to_tokens(x, alignment)), state

    def watched(
        self, tokens: Int[Array, "B T"], watch: Watch, state: State = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """(what the last norm is given, what was seen in each layer, with a leading axis N) of rows of one document each."""
        x, _, seen = self._through_blocks(self._embedded(tokens), None, state, None, None, watch)
        return x, seen

    def _embedded(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # Unknown tokens become NaN, which is seen; the default would clip them to a token that exists.
        x = jnp.take(self.embedding[...], tokens, axis=0, mode="fill", fill_value=jnp.nan)
        return x.astype(self.config.compute_dtype)

    def _through_blocks(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Array | None,
        state: State,
        sequence_axis: str | None,
        gather: Callable[[Params], Params] | None,
        watch: Watch | None = None,
    ) -> tuple[Float[Array, "B T D"], State, Any]:
        """(what the last norm is given, the state afterwards, what was seen)."""
        config = self.config
        structure, params = nnx.split(self.blocks)
        layers = nnx.to_pure_dict(params)
        commit = getattr(MIXERS[config.mixer], "commit", None)
        in_place = state is not None and x.shape[1] == 1 and commit is None and watch is None

        def layer(x: Any, given: tuple[tuple[Params, Residual], State]) -> tuple[Any, State]:
            (params, rule), state = given
            params = params if gather is None else gather(params)
            block: Block = nnx.merge(structure, params)
            seen = None if watch is None else watch(block)
            x, after = block(x, segment_ids, state, sequence_axis=sequence_axis, residual=rule)
            return x, after if seen is None else (after, seen())

        kept = _remat(layer, config.remat, gather is not None)
        through = partial(_in_place, layer) if in_place else partial(lax.scan, kept)
        if self.read is None:
            x, after = through(x, ((layers, PLAIN), state))
        else:
            x, after = attend_over_depth(config, kept, through, x, layers, state, self.read)
        after, seen = (after, None) if watch is None else after
        if commit is not None:
            after = commit(init_state(config, x.shape[0]) if state is None else state, after)
        return x, after, seen

    def head(self, hidden: Float[Array, "... D"]) -> Float[Array, "... E"]:
        """Logits in float32."""
        if self.unembedding is not None:
            return self.unembedding(hidden, jnp.float32)
        kernel = self.embedding[...].astype(hidden.dtype)
        return jnp.einsum("...d,ed->...e", hidden, kernel, preferred_element_type=jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: State = None,
        *,
        sequence_axis: str | None = None,
    ) -> tuple[Float[Array, "B T E"], State]:
        """Logits of the next token at each token, float32, and the state after the last.

        segment_ids    [B, T]: the document of each token, not decreasing along a row, 0 for padding; None: one document
        state          continues an earlier call's; None starts empty
        sequence_axis  inside shard_map: the mesh axis along which T is sharded
        """
        _check_call(self.config, tokens, segment_ids, state)
        structure, params = nnx.split(self)
        call = (structure, sequence_axis, nnx.to_pure_dict(params), tokens, segment_ids, state)
        if self.config.check and not isinstance(tokens, jax.core.Tracer):
            error, result = _checked(*call)
            error.throw()
            return result
        return _compiled(*call)


def _in_place(
    layer: Callable[..., tuple[Any, State]], x: Any, given: tuple[tuple[Params, Residual], State]
) -> tuple[Any, State]:
    """The layers in order, each of which changes its part of the states. A scan that is given the states and gives them back
    has two copies of them all, and moves one to the other."""

    layers, states = given

    def step(carry: tuple[Any, State], numbered: tuple[Array, Any]) -> tuple[tuple[Any, State], None]:
        (x, states), (number, params) = carry, numbered
        state = jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, number, keepdims=False), states)
        x, state = layer(x, (params, state))
        states = jax.tree.map(lambda s, new: lax.dynamic_update_index_in_dim(s, new, number, 0), states, state)
        return (x, states), None

    numbers = jnp.arange(jax.tree.leaves(layers)[0].shape[0])
    return lax.scan(step, (x, states), (numbers, layers))[0]


def _forward(
    structure: nnx.GraphDef[LanguageModel],
    sequence_axis: str | None,
    params: Params,
    tokens: Array,
    segment_ids: Array | None,
    state: State,
) -> tuple[Array, State]:
    model = nnx.merge(structure, params)
    hidden, state = model.hidden(tokens, segment_ids, state, sequence_axis=sequence_axis)
    return model.head(hidden), state


_compiled = jax.jit(_forward, static_argnums=(0, 1))


@partial(jax.jit, static_argnums=(0, 1))
def _checked(structure: Any, sequence_axis: str | None, *arrays: Any) -> tuple[checkify.Error, tuple[Array, State]]:
    return checkify.checkify(partial(_forward, structure, sequence_axis))(*arrays)


def init_state(config: ModelConfig, batch: int) -> State:
    """What an empty prefix leaves, for every layer of a model with this configuration."""
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is {batch!r}; it must be an integer of at least 1")
    state = MIXERS[config.mixer].init_state(config, batch)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (config.layers, *x.shape)), state)


def state_bytes(config: ModelConfig, batch: int = 1) -> int:
    """Bytes of the state of all layers; only the Transformer's depends on a length, that of `max_length`."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: init_state(config, batch))))


def functional(model: LanguageModel) -> tuple[Callable[..., tuple[Array, State]], Params]:
    """(forward, params): a pure `forward(params, tokens, segment_ids=None, state=None)` for `jax.jit` and `jax.grad`,
    and the parameters as a nested dict, such as params["blocks"]["mixer"]["query"]["kernel"] of [N, D, h K]."""
    structure, params = nnx.split(model)

    def forward(
        params: Params,
        tokens: Array,
        segment_ids: Array | None = None,
        state: State = None,
        *,
        sequence_axis: str | None = None,
    ) -> tuple[Array, State]:
        return _forward(structure, sequence_axis, params, tokens, segment_ids, state)

    return forward, nnx.to_pure_dict(params)


def named(tree: Any) -> dict[str, Any]:
    """{"blocks.mixer.query.kernel": array, ...} of parameters or of a state, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def weight_decay_mask(model: LanguageModel) -> Params:
    """For each parameter of `functional(model)`, whether weight decay is for it: not for norms, gates, decays, biases."""
    marks = nnx.state(model)
    is_param = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    marks = jax.tree.map(lambda v: v.get_metadata("weight_decay", True), marks, is_leaf=is_param)
    return nnx.to_pure_dict(marks)


def _check_call(config: ModelConfig, tokens: Any, segment_ids: Any, state: State) -> None:
    for name, x in (("tokens", tokens), ("segment_ids", segment_ids)):
        if name == "segment_ids" and x is None:
            continue
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name} is {getattr(x, 'dtype', type(x).__name__)}; it must be an array of integers")
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [B T] with at least one row and one token")
    if segment_ids is not None and segment_ids.shape != tokens.shape:
        raise ValueError(f"segment_ids has shape {segment_ids.shape}; it must be that of tokens, {tokens.shape}")
    if state is None:
        return
    expected = jax.eval_shape(lambda: init_state(config, tokens.shape[0]))
    structures: list[Any] = [jax.tree.structure(tree) for tree in (state, expected)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"state is not that of mixer {config.mixer!r} with this configuration; make it with model.init_state"
        )
    given = jax.tree_util.tree_leaves_with_path(state)
    for (path, x), needed in zip(given, jax.tree.leaves(expected), strict=True):
        if x.shape != needed.shape or x.dtype != needed.dtype:
            raise ValueError(
                f"state{jax.tree_util.keystr(path)} is {x.dtype}{list(x.shape)}; {tokens.shape[0]} rows of tokens and this "
                f"configuration need {needed.dtype}{list(needed.shape)}"
            )
