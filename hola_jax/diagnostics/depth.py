"""Spikes and sinks (arXiv 2603.05498): activations that tower over all others, and reads that go nowhere, depth by depth.

Depth d is what sub-layer d reads, mixers and MLPs in turn; depth 2 N is what the last norm is given. Where the residual rule
is plain, depth d + 1 is the running sum after sub-layer d. The forward pass is the model's own, whatever its rule and norms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from hola_jax.array_types import Array, Float, Int
from hola_jax.diagnostics.insight import look, not_shown, note_memory
from hola_jax.model import Block, LanguageModel, Params

SUBLAYERS = ("mixer", "mlp")
MASSIVE, OVER_MEDIAN = (
    100.0,
    1000.0,
)  # the older rule: an activation is massive that is both as large and so far above the rest
SINK = 0.3  # of a head's attention
SPIKE_TOKENS = 8


class Spikes(NamedTuple):
    """Activations [B T D] at S depths."""

    largest: Float[Array, " S"]  # |x|
    row: Int[Array, " S"]  # of the largest
    token: Int[Array, " S"]
    channel: Int[Array, " S"]
    median: Float[Array, " S"]  # of |x|
    massive: Int[Array, " S"]  # how many activations are massive
    channels: Int[Array, "S 3"]  # those with the largest |x|
    tops: Float[Array, "S 3"]  # and how large

    @property
    def ratio(self) -> Float[Array, " S"]:
        return self.largest / self.median


class Masses(NamedTuple):
    """Where reads go, means over rows and tokens. HOLA alone has a null sink and a cache: NaN for a Transformer."""

    null_sink: Float[Array, "N H"]
    cache: Float[Array, "N H"]
    block: Float[Array, "N H"]  # the running block; for a Transformer, all tokens
    received: Float[Array, "N H T"]  # alpha_k: by token k, the mean over the tokens from k on

    @property
    def first_token(self) -> Float[Array, "N H"]:
        """alpha of the first token, the mean mass that is put on it."""
        return self.received[..., 0]

    @property
    def sink_ratio(self) -> Float[Array, ""]:
        """Share of heads in which the first token is a sink."""
        return jnp.mean(self.first_token > SINK)


class DepthReport(NamedTuple):
    """What `depth_report` measures of N layers; `print(report.table())` shows it."""

    reads: Spikes  # of the 2 N + 1 depths
    answers: Spikes  # of the 2 N sub-layers' outputs
    cosine: Float[
        Array, " depths"
    ]  # mean cosine between the spike tokens, those that spike after the step up; NaN for one
    masses: Masses | None  # None where no token is read, or what is read cannot be told (`insight.not_shown`)
    amplifier_norms: Float[Array, "N D"]  # |U_k| of each layer's MLP, by channel k
    amplifier_channel: Int[Array, " N"]  # the channel with the largest
    amplifier_eigenvalue: Float[Array, " N"]  # of its symmetrised U_k, the one of largest magnitude

    @property
    def step_up(self) -> int:
        """The sub-layer behind which the largest activation has grown most, as a factor."""
        return int(_growth(self.reads).argmax())

    @property
    def step_down(self) -> int:
        """The one behind which it has shrunk most."""
        return int(_growth(self.reads).argmin())

    def table(self) -> str:
        """For the console: a line for each depth, then one for each layer."""
        found = jax.tree.map(np.asarray, self)
        ratio, count = found.reads.ratio, len(found.reads.largest)
        lines = [
            f"{'depth read by':<16} {'largest':>9} {'of median':>9} {'massive':>7} {'token':>6}  channels    answer"
        ]
        for d in range(count):
            name = f"{d // 2} {SUBLAYERS[d % 2]}" if d < count - 1 else "the last norm"
            top = ",".join(map(str, found.reads.channels[d]))
            answer = f"{found.answers.largest[d]:9.3g}" if d < count - 1 else ""
            marks = [mark for mark, at in ((" up", self.step_up), (" down", self.step_down)) if at == d]
            lines.append(
                f"{name:<16} {found.reads.largest[d]:9.3g} {ratio[d]:9.1f} {found.reads.massive[d]:7d} "
                f"{found.reads.token[d]:6d}  {top:<11} {answer}{''.join(marks)}"
            )
        lines.append(
            f"{'layer':<6} {'amplifier':>9} {'channel':>7} {'eigenvalue':>10}" + (_MASSES if found.masses else "")
        )
        for n, channel in enumerate(found.amplifier_channel):
            norm, top = found.amplifier_norms[n, channel], found.amplifier_eigenvalue[n]
            lines.append(f"{n:<6} {norm:9.3g} {channel:7d} {top:10.3g}" + _of_layer(found.masses, n))
        if self.masses is not None:
            lines.append(f"heads whose first token holds more than {SINK}: {float(self.masses.sink_ratio):.1%}")
        return "\n".join(lines)


_MASSES = "  by head: null sink, cache, block, first token"


def _of_layer(masses: Masses | None, layer: int) -> str:
    if masses is None:
        return ""
    parts = (masses.null_sink, masses.cache, masses.block, masses.first_token)
    return "  " + "; ".join(" ".join(f"{x[layer, head]:.2f}" for x in parts) for head in range(parts[0].shape[1]))


def _growth(reads: Spikes) -> np.ndarray:
    largest = np.asarray(reads.largest)
    return np.diff(np.log(np.maximum(largest, 1e-30)))


def depth_report(model: LanguageModel, tokens: Int[Array | np.ndarray, "B T"]) -> DepthReport:
    """Spikes, sinks and amplifiers of a model on rows of one document each; attention takes H T^2 numbers at a time."""
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; it must be [B T], rows of at least one token")
    structure, params = nnx.split(model)
    return _report(structure, nnx.to_pure_dict(params), jnp.asarray(tokens, jnp.int32))


def depth_signs(model: LanguageModel, tokens: Int[Array, "B T"]) -> dict[str, Float[Array, ""]]:
    """The cheap ones of them, by name, to be watched while a model trains.

    largest_after.3.mlp, ratio_after.3.mlp    largest |activation| behind layer 3's MLP, and over the median
    null_sink.3, cache.3, block.3             of HOLA: mass of the reads, means over heads
    first_token.3, sink_ratio                 mass on the first token; share of heads in which it is above 0.3
    """
    depths, masses = _seen(model, tokens)
    signs = {}
    for number in range(2 * model.config.layers):
        name = f"{number // 2}.{SUBLAYERS[number % 2]}"
        signs[f"largest_after.{name}"] = depths.reads.largest[number + 1]
        signs[f"ratio_after.{name}"] = depths.reads.ratio[number + 1]
    if masses is None:
        return signs
    shown = ["first_token", *(("null_sink", "cache", "block") if model.config.mixer == "hola" else ())]
    for layer in range(model.config.layers):
        signs |= {f"{name}.{layer}": jnp.mean(getattr(masses, name)[layer]) for name in shown}
    return signs | {"sink_ratio": masses.sink_ratio}


class Depths(NamedTuple):
    """What a forward pass shows."""

    reads: Spikes  # [2 N + 1]
    answers: Spikes  # [2 N]
    sizes: Float[Array, "depths B T"]  # of each token, its largest |x|


@partial(jax.jit, static_argnums=0)
def _report(structure: Any, params: Params, tokens: Array) -> DepthReport:
    model: LanguageModel = nnx.merge(structure, params)
    depths, masses = _seen(model, tokens)
    mlp = model.blocks.mlp
    kernels = mlp.gate.kernel[...], mlp.up.kernel[...], mlp.down.kernel[...]
    norms = lax.map(lambda layer: amplifier_norms(*layer), kernels)
    channel = jnp.argmax(norms, axis=-1)
    own = jnp.take_along_axis(kernels[2], channel[:, None, None], axis=2)[..., 0]
    eigenvalue = lax.map(lambda layer: amplifier_eigenvalue(*layer), (*kernels[:2], own))
    return DepthReport(
        depths.reads, depths.answers, _cosines(model, tokens, depths), masses, norms, channel, eigenvalue
    )


def spikes_of(x: Float[Array, "B T D"]) -> Spikes:
    """Of one depth, without the axis S."""
    size = jnp.abs(x.astype(jnp.float32))
    largest, median = jnp.max(size), jnp.median(size)
    row, token, channel = jnp.unravel_index(jnp.argmax(size), size.shape)
    massive = jnp.sum((size >= MASSIVE) & (size >= OVER_MEDIAN * median))
    tops, channels = lax.top_k(jnp.max(size, axis=(0, 1)), min(3, size.shape[-1]))
    return Spikes(largest, row, token, channel, median, massive, channels, tops)


def _size(x: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1)


def _stacked(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def _in_a_row(x: Any) -> Any:
    """[N 2 ..] as [2 N ..]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x)


def _watching(note: Callable[[list[Array], list[Array]], Any], block: Block) -> Callable[[], Any]:
    """Calls `note` with what the two sub-layers of a block read and answered."""
    mix, feed = block.mix, block.feed
    reads: list[Array] = []
    answers: list[Array] = []

    def mixing(x: Array, *rest: Any) -> tuple[Array, Any]:
        y, after = mix(x, *rest)
        reads.append(x)
        answers.append(y)
        return y, after

    def feeding(x: Array) -> Array:
        y = feed(x)
        reads.append(x)
        answers.append(y)
        return y

    block.mix, block.feed = mixing, feeding  # type: ignore[method-assign, assignment]
    return lambda: note(reads, answers)


def _seen(model: LanguageModel, tokens: Int[Array, "B T"]) -> tuple[Depths, Masses | None]:
    """One forward pass."""

    shown = model.config.mixer == "hola" and not not_shown(model.config.memory)

    def watch(block: Block) -> Callable[[], Any]:
        handed = note_memory(block) if shown else None

        def note(reads: list[Array], answers: list[Array]) -> Any:
            spikes = [_stacked([spikes_of(x) for x in parts]) for parts in (reads, answers)]
            masses = None
            if handed is not None:
                masses = _masses_of_hola(model, handed())
            elif model.config.mixer == "transformer":
                masses = _masses_of_attention(block, reads[0])
            return *spikes, jnp.stack([_size(x) for x in reads]), masses

        return _watching(note, block)

    last, (reads, answers, sizes, masses) = model.watched(tokens, watch)
    reads, answers, sizes = (_in_a_row(x) for x in (reads, answers, sizes))
    reads = jax.tree.map(lambda all_but, x: jnp.concatenate([all_but, x[None]]), reads, spikes_of(last))
    return Depths(reads, answers, jnp.concatenate([sizes, _size(last)[None]])), masses


def _received(weights: Float[Array, "... T T"]) -> Float[Array, "... T"]:
    """alpha_k of weights by query and key."""
    length = weights.shape[-1]
    return jnp.sum(weights, axis=-2) / (length - jnp.arange(length))


def _masses_of_hola(model: LanguageModel, handed: Any) -> Masses:
    config = model.config.memory

    def of_row(inputs: Any) -> Masses:
        weights = look(jax.tree.map(lambda x: x[None], inputs), handed.params, config).weights  # [T H T]
        blocks = jnp.arange(weights.shape[0]) // config.block
        running = blocks[:, None, None] == blocks
        parts = jnp.where(running, weights, 0), jnp.where(running, 0, weights)
        block, cache = (jnp.mean(jnp.sum(part, axis=-1), axis=0) for part in parts)
        return Masses(1 - block - cache, cache, block, _received(weights.swapaxes(0, 1)))

    return jax.tree.map(lambda x: jnp.mean(x, axis=0), lax.map(of_row, handed.inputs))


def _masses_of_attention(block: Block, x: Float[Array, "B T D"]) -> Masses:
    mixer, length = block.mixer, x.shape[1]
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), x.shape[:2])
    normed = block.mixer_norm(x)
    q, tokens = mixer.project(normed, normed, jnp.ones_like(places), places)
    grouped = q.reshape(*q.shape[:2], tokens.keys.shape[2], -1, q.shape[-1])

    def of_row(given: tuple[Array, Array]) -> Array:
        logits = jnp.einsum("thgk,shk->hgts", *given, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        causal = jnp.tril(jnp.ones((length, length), bool))
        return _received(jax.nn.softmax(jnp.where(causal, logits, -jnp.inf))).reshape(-1, length)

    received = jnp.mean(lax.map(of_row, (grouped, tokens.keys)), axis=0)
    none, whole = jnp.full(received.shape[0], jnp.nan), jnp.ones(received.shape[0])
    return Masses(none, none, whole, received)


def _cosines(model: LanguageModel, tokens: Int[Array, "B T"], depths: Depths) -> Float[Array, " depths"]:
    """Between the tokens that, behind the step up, are at least half as large as the largest: at every depth."""
    growth = jnp.diff(jnp.log(jnp.maximum(depths.reads.largest, 1e-30)))
    sizes = depths.sizes[jnp.argmax(growth) + 1].ravel()
    size, index = lax.top_k(sizes, min(SPIKE_TOKENS, sizes.size))
    spikes = size >= size[0] / 2
    pairs = spikes[:, None] & spikes & ~jnp.eye(len(index), dtype=bool)

    def chosen(x: Float[Array, "B T D"]) -> Float[Array, "M D"]:
        return x.reshape(-1, x.shape[-1])[index].astype(jnp.float32)

    def cosine(x: Float[Array, "M D"]) -> Array:
        unit = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
        return jnp.sum(jnp.where(pairs, unit @ unit.T, 0)) / jnp.sum(pairs)  # 0 / 0 for a single token

    watch = partial(_watching, lambda reads, _: jnp.stack([cosine(chosen(x)) for x in reads]))
    last, found = model.watched(tokens, watch)
    return jnp.append(_in_a_row(found), cosine(chosen(last)))


def amplifier_norms(
    gate: Float[Array, "D F"], up: Float[Array, "D F"], down: Float[Array, "F D"]
) -> Float[Array, " D"]:
    """|U_k| for each channel k, of U_k = sum_i down[i, k] gate_i up_i': the MLP answers about x' U_k x. No U_k is made."""
    dot = partial(jnp.dot, precision=lax.Precision.HIGHEST)
    pairs = dot(gate.T, gate) * dot(up.T, up)  # [F F]
    return jnp.sqrt(jnp.maximum(jnp.sum(down * dot(pairs, down), axis=0), 0))


def amplifier_eigenvalue(
    gate: Float[Array, "D F"], up: Float[Array, "D F"], down: Float[Array, " F"], steps: int = 200
) -> Float[Array, ""]:
    """Of (U + U') / 2 of one channel, the eigenvalue of largest magnitude, by power iteration on the square."""
    dot = partial(jnp.dot, precision=lax.Precision.HIGHEST)

    def apply(v: Float[Array, " D"]) -> Float[Array, " D"]:
        return (dot(gate, down * dot(up.T, v)) + dot(up, down * dot(gate.T, v))) / 2

    def step(_: Any, v: Array) -> Array:
        v = apply(apply(v))
        return v / jnp.maximum(jnp.linalg.norm(v), 1e-30)

    start = jax.random.normal(jax.random.key(0), gate.shape[:1])
    v = lax.fori_loop(0, steps, step, start / jnp.linalg.norm(start))
    image = apply(v)
    return jnp.copysign(jnp.linalg.norm(image), jnp.sum(v * image))
