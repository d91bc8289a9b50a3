"""The accelerator at hand, in one command of less than 8 minutes: `python benchmarks/gpu.py`, or `--help`.

    exact     the memory's outputs and gradients against float64 on fresh random inputs
    memory    milliseconds of forward and backward, K = V = 256, H = 4, bfloat16: Gated DeltaNet by each of our
              implementations and by flash-linear-attention's Triton kernel (where torch and `fla` are installed), HOLA at
              W = 64 and 256, the cache's read alone; each beside the others, with the ratios and the floor
    decoding  one token, of a layer's memory by each of our implementations and of the whole model: bytes that have to move
              over the bandwidth of a copy, and the time at 128k tokens of context beside that at 2k
    training  real steps (train.step: forward, backward, AdamW) on made-up tokens: tokens per second, MFU, and HOLA's step
              over Gated DeltaNet's

Wants jax, flax, optax, numpy and jaxtyping alone. What cannot run here is named with the reason, and the rest is measured.
`--profile DIR` leaves a trace of three steps of the first model. On a CPU, `--preset tiny --rows 8 --tokens 256 --width 64
--heads 1 --shapes 1x256` shows what the tables look like.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from hola_jax import LanguageModel, preset
from hola_jax.memory import CacheParams, MemoryConfig, MemoryState, hola_memory, init_state, linear_memory
from hola_jax.model import functional
from train.layout import Layout
from train.mesh import MeshConfig, make_mesh
from train.metrics import peak_flops
from train.optimizer import OptimizerConfig
from train.report import report
from train.step import Training

PARTS = ("exact", "memory", "decoding", "training")
IMPLEMENTATIONS = ("xla", "pallas")
BLOCK, CHUNK = 256, 64
WINDOWS = (64, 256)
NEAR, FAR = 2048, 131072  # tokens of context before a decoded one, whole blocks
LOOP = 64  # tokens decoded in one call of the memory: so many that starting it is not what is measured
# Of a token and head at K = V = 256 (issue of the kernels): operations forward and backward, on an H200 about 790 TFLOP/s.
FLOOR_FLOPS, REACHED = 524_288 + 1_081_344, 790e12

Inputs = tuple[Any, Any, Any, Any, Any]  # q, k, v, beta, log decay


def seconds(call: Callable[[], Any], budget: float = 1.0) -> float:
    """The median of many calls, each batch of them waited for once, so that starting a call is not what is measured."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - start
    calls = int(np.clip(budget / 5 / max(once, 1e-6), 1, 50))
    batches = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        batches.append((time.perf_counter() - start) / calls)
    return statistics.median(batches)


def made_inputs(batch: int, tokens: int, heads: int, width: int, seed: int) -> Inputs:
    draw = np.random.default_rng(seed)
    q, k, v = (draw.normal(size=(batch, tokens, heads, width)).astype(np.float32) for _ in range(3))
    beta = draw.uniform(size=(batch, tokens, heads)).astype(np.float32)
    decay = -draw.exponential(0.1, size=(batch, tokens, heads)).astype(np.float32)
    return q, k, v, beta, decay


def params(heads: int, width: int) -> CacheParams:
    """A gate half open, so that the read counts."""
    return CacheParams(jnp.ones(width), jnp.ones(width), jnp.zeros(heads), jnp.zeros(heads))


def gated_delta_net(implementation: str) -> Callable[..., Any]:
    def run(q: Any, k: Any, v: Any, beta: Any, decay: Any) -> Any:
        scale = q.shape[-1] ** -0.5
        return linear_memory(q, k, v, beta, decay, scale=scale, chunk=CHUNK, implementation=implementation)[0]  # type: ignore[arg-type]

    return run


def hola(implementation: str, window: int, score: str = "surprise") -> Callable[..., Any]:
    config = MemoryConfig(window=window, block=BLOCK, chunk=CHUNK, score=score)  # type: ignore[arg-type]

    def run(q: Any, k: Any, v: Any, beta: Any, decay: Any) -> Any:
        given = params(v.shape[2], q.shape[3])
        return hola_memory(q, k, v, beta, decay, given, config=config, implementation=implementation)[0]  # type: ignore[arg-type]

    return run


def read_alone(window: int) -> Callable[..., Any]:
    """The Mosaic kernels of the cache, on scores that are given."""
    from pallas_kernels.cache.gpu import cached_read

    def run(q: Any, k: Any, v: Any, beta: Any, decay: Any) -> Any:
        scores, sink = jnp.swapaxes(beta, 1, 2), jnp.zeros(v.shape[2])
        return cached_read(q * q.shape[3] ** -0.5, k, v, scores, sink, window=window, block=BLOCK)[0]

    return run


# exact: against float64


def exact_memory(inputs: Sequence[Any], window: int, block: int) -> np.ndarray:
    """One row of a batch, token by token in float64, with the score "recency": the cache is the last W tokens of the
    blocks before. The scales are 1, sink logit and gate logit 0."""
    q, k, v, beta, decay = (np.asarray(x, np.float64)[0] for x in inputs)
    tokens, heads, width = q.shape

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)

    def rms(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    state, out = np.zeros((heads, width, v.shape[2])), np.zeros_like(v)
    asks, keys, to_read, to_write = rms(q) * width**-0.5, rms(k), unit(q), unit(k)
    for t in range(tokens):
        state *= np.exp(decay[t])[:, None, None]
        surprise = v[t] - np.einsum("hk,hkv->hv", to_write[t], state)
        state += np.einsum("hk,hv->hkv", beta[t][:, None] * to_write[t], surprise)
        first = t - t % block
        seen = np.r_[max(0, first - window) : first, first : t + 1]
        weights = np.exp(np.einsum("hk,shk->hs", asks[t], keys[seen]))
        read = np.einsum("hs,shv->hv", weights, v[seen]) / (1 + weights.sum(-1))[:, None]
        out[t] = width**-0.5 * np.einsum("hk,hkv->hv", to_read[t], state) + 0.5 * read
    return out


def errors(
    implementation: str, heads: int, width: int, tokens: int, block: int, window: int, seed: int
) -> tuple[float, float]:
    """Of the outputs, and of the gradient along one random direction, which float64 has by a central difference: both
    relative to the root mean square of what is right. Inputs are rounded to bfloat16 before both."""
    draw = np.random.default_rng(seed)
    inputs = tuple(
        np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in made_inputs(1, tokens, heads, width, seed)
    )
    weights = draw.normal(size=inputs[2].shape)
    way = [draw.normal(size=x.shape) * x.std() for x in inputs[:3]]
    config = MemoryConfig(window=window, block=block, chunk=min(CHUNK, block), score="recency")

    def loss(q: Any, k: Any, v: Any, beta: Any, decay: Any) -> Any:
        given = params(heads, width)
        out, _ = hola_memory(q, k, v, beta, decay, given, config=config, implementation=implementation)  # type: ignore[arg-type]
        return jnp.sum(out.astype(jnp.float32) * jnp.asarray(weights, jnp.float32)), out

    placed = [jnp.asarray(x, jnp.bfloat16 if i < 3 else jnp.float32) for i, x in enumerate(inputs)]
    gradient, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*placed)
    right = exact_memory(inputs, window, block)
    step = 1e-4
    sides = [
        exact_memory((*(x + side * step * d for x, d in zip(inputs[:3], way, strict=True)), *inputs[3:]), window, block)
        for side in (1, -1)
    ]
    slope = float(((sides[0] - sides[1]) * weights[0]).sum() / (2 * step))
    found = sum(float((np.asarray(g, np.float64) * d).sum()) for g, d in zip(gradient, way, strict=True))
    size = np.sqrt(sum(float(((np.asarray(g, np.float64) * d) ** 2).sum()) for g, d in zip(gradient, way, strict=True)))
    wrong = np.asarray(out, np.float64)[0] - right
    return float(np.sqrt((wrong**2).mean() / (right**2).mean())), abs(found - slope) / float(size)


def show_exact(options: argparse.Namespace) -> None:
    seed = time.time_ns() % 2**32
    tokens = min(4 * BLOCK, options.shapes[0][1])
    print(f"\nagainst float64 (numbers of bfloat16 are good to 4e-3), {tokens} tokens, seed {seed}")
    for implementation in IMPLEMENTATIONS:
        try:
            out, slope = errors(implementation, options.heads, options.width, tokens, BLOCK, 64, seed)
            print(f"  {implementation:8} outputs {out:.1e}, gradient along a random direction {slope:.1e}", flush=True)
        except Exception as error:
            print(f"  {implementation:8} {said(error)}")


# memory: forward and backward


def said(error: Exception) -> str:
    """Why something did not run, in a line."""
    return f"not here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def forward_backward(run: Callable[..., Any], inputs: Inputs, weights: Any) -> Callable[[], Any]:
    """A compiled call."""

    def loss(weights: Any, *given: Any) -> Any:
        return jnp.sum(run(*given).astype(jnp.float32) * weights)

    call = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4, 5))).lower(weights, *inputs).compile()
    return lambda: call(weights, *inputs)


def compiled(make: Callable[[], Callable[..., Any]], inputs: Inputs, weights: Any) -> Callable[[], Any]:
    return forward_backward(make(), inputs, weights)


def measured(call: Future[Callable[[], Any]]) -> float:
    return seconds(call.result())


def triton_peer(inputs: Inputs) -> float:
    """Seconds of flash-linear-attention's kernel, forward and backward, on the same numbers."""
    import torch  # type: ignore[import-not-found, unused-ignore]
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found, unused-ignore]

    types = [torch.bfloat16] * 4 + [torch.float32]
    arrays = [
        torch.tensor(np.asarray(x, np.float32), device="cuda", dtype=kind).requires_grad_()
        for x, kind in zip(inputs, types, strict=True)
    ]
    q, k, v, beta, decay = arrays
    weights = torch.randn_like(v)

    def call() -> None:
        out = chunk_gated_delta_rule(q=q, k=k, v=v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)[0]
        torch.autograd.grad(out, arrays, weights)

    for _ in range(3):
        call()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 20)
    return statistics.median(times)


def contenders(inputs: Inputs, all_of_them: bool) -> dict[str, Callable[[], float]]:
    """Each gives its seconds, or fails with the reason why it is not here. They are compiled side by side, then measured
    one by one. XLA's HOLA and the read alone can be left out, for they take most of the time."""
    placed: Any = tuple(jnp.asarray(x, jnp.bfloat16 if i < 3 else jnp.float32) for i, x in enumerate(inputs))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=inputs[2].shape), jnp.float32)
    made: dict[str, Callable[[], Callable[..., Any]]] = {}
    for name in IMPLEMENTATIONS:
        made[f"GDN {name}"] = functools.partial(gated_delta_net, name)
        for window in WINDOWS if all_of_them or name != "xla" else ():
            made[f"HOLA {name} W={window}"] = functools.partial(hola, name, window)
    for window in WINDOWS if all_of_them else ():
        made[f"read alone, Mosaic W={window}"] = functools.partial(read_alone, window)
    with ThreadPoolExecutor(8) as pool:
        calls = {title: pool.submit(compiled, make, placed, weights) for title, make in made.items()}
    found = {title: functools.partial(measured, call) for title, call in calls.items()}
    return {**found, "GDN fla (Triton)": functools.partial(triton_peer, inputs)}


def show_memory(options: argparse.Namespace) -> None:
    """Every contender on each shape, then the ratios that the targets are about."""
    for number, (batch, tokens) in enumerate(options.shapes):
        print(f"\nforward + backward, B={batch} T={tokens} H={options.heads} K=V={options.width}, milliseconds")
        took: dict[str, float] = {}
        inputs = made_inputs(batch, tokens, options.heads, options.width, 0)
        for title, run in contenders(inputs, number == 0).items():
            try:
                took[title] = run()
                print(f"  {title:28} {1e3 * took[title]:9.3f}", flush=True)
            except Exception as error:  # the others are measured all the same
                print(f"  {title:28} {said(error)}", flush=True)
        for line in ratios(took, batch * tokens * options.heads if options.width == 256 else None):
            print(f"  {line}")


def ratios(took: dict[str, float], rows: int | None) -> list[str]:
    """What the targets compare, as far as it was measured. `rows`: tokens x heads, where the floor is known."""
    lines = []
    for name in IMPLEMENTATIONS:
        own = took.get(f"GDN {name}")
        if own is None:
            continue
        if peer := took.get("GDN fla (Triton)"):
            lines.append(f"GDN {name} / fla = {own / peer:.2f} (target: at most 0.67)")
        for window, most in zip(WINDOWS, (1.6, 2.1), strict=True):
            if all_of_it := took.get(f"HOLA {name} W={window}"):
                lines.append(f"HOLA W={window} / GDN, {name} = {all_of_it / own:.2f} (target: at most {most})")
        if rows is not None:
            lines.append(
                f"GDN {name} / floor at 790 TFLOP/s = {own * REACHED / (rows * FLOOR_FLOPS):.1f} (target: at most 3)"
            )
    return lines


# decoding: one token


def copy_bandwidth(size: int) -> float:
    """Bytes per second that a copy reads and writes."""
    x = jnp.zeros(size // 4, jnp.float32)
    call = jax.jit(lambda x: x + 1)
    return 2 * x.size * 4 / seconds(lambda: call(x))


def step_bytes(batch: int, heads: int, width: int) -> float:
    """That a token of a layer's memory has to move, the mean over a call of `decode_memory`: S both ways, the cache's rows
    and the running block's that hold a token, in bfloat16."""
    rows = WINDOWS[0] + (LOOP - 1) / 2
    return batch * heads * (2 * 4 * width**2 + rows * 2 * width * 2)


def decode_memory(implementation: str) -> Callable[..., tuple[Any, MemoryState]]:
    """(state, q, k, v, beta, decay of one token) -> what LOOP tokens alike add up to, and the state behind them."""
    config = MemoryConfig(window=WINDOWS[0], block=BLOCK, chunk=CHUNK)

    def run(state: MemoryState, *token: Any) -> tuple[Any, MemoryState]:
        given = params(token[2].shape[2], token[0].shape[3])

        def one(_: Any, carry: tuple[Any, MemoryState]) -> tuple[Any, MemoryState]:
            total, state = carry
            out, state = hola_memory(*token, given, config=config, state=state, implementation=implementation)  # type: ignore[arg-type]
            return total + out.astype(jnp.float32), state

        return jax.lax.fori_loop(0, LOOP, one, (jnp.zeros(token[2].shape), state))

    return run


def memory_state(batch: int, heads: int, width: int, position: int) -> MemoryState:
    """Behind so many tokens; its numbers are as good as any."""
    config = MemoryConfig(window=WINDOWS[0], block=BLOCK, chunk=CHUNK)
    state = init_state(config, batch, heads, width, width, jnp.bfloat16)
    return dataclasses.replace(
        state,
        cache_scores=jnp.zeros_like(state.cache_scores),
        position=jnp.full_like(state.position, position),
        document=jnp.ones_like(state.document),
    )


def step_times(implementation: str, batch: int, heads: int, width: int) -> list[float]:
    """Seconds of a token at NEAR and FAR."""
    inputs = made_inputs(batch, 1, heads, width, 0)
    token = [jnp.asarray(x, jnp.bfloat16 if i < 3 else jnp.float32) for i, x in enumerate(inputs)]
    run = jax.jit(decode_memory(implementation), donate_argnums=0)
    states = [memory_state(batch, heads, width, position) for position in (NEAR, FAR)]
    step = run.lower(states[0], *token).compile()
    for state in states:
        jax.block_until_ready(step(jax.tree.map(jnp.copy, state), *token))
    found = []
    for state in states:
        times = []
        for _ in range(7):
            given = jax.block_until_ready(jax.tree.map(jnp.copy, state))
            start = time.perf_counter()
            jax.block_until_ready(step(given, *token))
            times.append((time.perf_counter() - start) / LOOP)
        found.append(statistics.median(times))
    return found


def share(near: float, far: float, moved: float, bandwidth: float) -> str:
    """A line of a table, with its targets."""
    return (
        f"{1e3 * near:8.3f} ms, {moved / 2**20:8.1f} MiB, {moved / near / bandwidth:6.1%} of the copy "
        f"(target: at least 60%); at 128k tokens {far / near - 1:+.1%} (target: at most 2%)"
    )


def decoding(name: str, batch: int, positions: Sequence[int]) -> tuple[list[float], int]:
    """(seconds of a token behind so many others, bytes that it has to move): the parameters once, and the state of each
    row once. A position says how long the context was; a state has no other trace of its length."""
    config = preset(name)
    model = LanguageModel(config)
    forward, weights = functional(model)
    weights = jax.tree.map(lambda x: x.astype(config.compute_dtype), weights)
    tokens = jnp.ones((batch, 1), jnp.int32)
    moved = sum(x.nbytes for x in jax.tree.leaves((weights, model.init_state(batch))))
    step = jax.jit(forward, donate_argnums=(3,))
    medians = []
    for position in positions:
        state = jax.tree_util.tree_map_with_path(
            lambda path, x, position=position: jnp.full_like(x, position) if str(path[-1]) == ".position" else x,
            model.init_state(batch),
        )
        _, state = step(weights, tokens, None, state)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(20):
                logits, state = step(weights, tokens, None, state)
            jax.block_until_ready(logits)
            times.append((time.perf_counter() - start) / 20)
        medians.append(statistics.median(times))
    return medians, moved


def show_decoding(options: argparse.Namespace) -> None:
    bandwidth = copy_bandwidth(options.copy_bytes)
    print(f"\ndecoding: a copy moves {bandwidth / 1e12:.2f} TB/s")
    for batch in options.decode_batches:
        for implementation in IMPLEMENTATIONS:
            try:
                near, far = step_times(implementation, batch, options.heads, options.width)
                told = share(near, far, step_bytes(batch, options.heads, options.width), bandwidth)
            except Exception as error:  # the others are measured all the same
                told = said(error)
            print(f"  memory, {implementation:6} B={batch:<4} {told}", flush=True)
    for model in (m for m in options.models.split(",") if m in ("hola", "gdn")):
        for batch in options.decode_batches:
            (near, far), moved = decoding(f"{model}-{options.preset}", batch, (NEAR, FAR))
            print(f"  model, {model:7} B={batch:<4} {share(near, far, moved, bandwidth)}", flush=True)


# training: whole steps


def made_batch(layout: Layout, rows: int, tokens: int) -> dict[str, jax.Array]:
    """Tokens at random, one document to a row."""
    numbers = np.random.default_rng(0).integers(layout.model.vocab_size, size=(rows, tokens + 1)).astype(np.int32)
    ones = np.ones((rows, tokens), np.int32)
    batch = {"tokens": numbers[:, :-1], "targets": numbers[:, 1:], "segment_ids": ones, "mask": ones.astype(np.uint8)}
    return {name: jax.device_put(x, layout.batch_sharding) for name, x in batch.items()}


def measure(name: str, options: argparse.Namespace, profile: str | None) -> float:
    """Prints the row of one model; seconds of its step."""
    device = jax.devices()[0]
    layout = Layout(
        dataclasses.replace(preset(name), remat=options.remat, implementation=options.implementation),
        make_mesh(MeshConfig(), [device]),
    )
    training = Training(layout, OptimizerConfig(), 1000, options.microbatches, 0.0, options.loss_chunk)
    start = time.perf_counter()
    step = training.lower(options.rows, options.tokens).compile()
    cost = report(step, layout, options.rows, options.tokens, time.perf_counter() - start)
    state, batch = layout.init(0), made_batch(layout, options.rows, options.tokens)
    times: list[float] = []
    metrics: Any = None
    for _ in range(options.steps + 2):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    median = statistics.median(times[2:])
    peak = peak_flops(device.device_kind)
    mfu = "unknown" if peak is None else f"{cost.analytic_flops / median / peak:.1%}"
    rate = options.rows * options.tokens / median
    print(
        f"{name:18} {1e3 * median:10.1f} ms {rate:12,.0f} tokens/s  MFU {mfu:8} {cost.peak_bytes / 2**30:7.2f} GiB  "
        f"compiled in {cost.compile_seconds:.0f} s, {cost.implementation}, loss {float(metrics['loss']):.3f}",
        flush=True,
    )
    if profile:
        with jax.profiler.trace(profile):
            for _ in range(3):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
    return median


def show_training(options: argparse.Namespace) -> None:
    print(f"\ntraining: {options.rows} rows of {options.tokens} tokens a step (target: HOLA at least 151,000 tokens/s)")
    took = {}
    for number, model in enumerate(options.models.split(",")):
        took[model] = measure(f"{model}-{options.preset}", options, options.profile if number == 0 else None)
    if "hola" in took and "gdn" in took:
        print(f"HOLA's step / GDN's = {took['hola'] / took['gdn']:.3f} (target: at most 1.06)")


def shapes(text: str) -> list[tuple[int, int]]:
    """[(16, 2048), (4, 8192)] of "16x2048,4x8192"."""
    pairs = [tuple(int(n) for n in part.split("x")) for part in text.split(",")]
    if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}; write BATCHxTOKENS,..., such as 16x2048,4x8192")
    return [(batch, tokens) for batch, tokens in pairs]


def chosen_parts(text: str) -> list[str]:
    if unknown := [part for part in text.split(",") if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}; the parts are {', '.join(PARTS)}")
    return text.split(",")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=chosen_parts, default=",".join(PARTS), help="which of the four, by comma")
    parser.add_argument("--preset", default="340m", help="scale of the models")
    parser.add_argument("--models", default="hola,gdn,transformer", help="which, by the presets' first part")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--remat", default="full", help="none, dots or full")
    parser.add_argument("--implementation", default=None, help="of the models' memory; the default chooses")
    parser.add_argument("--loss-chunk", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", default=None, help="folder for a trace")
    parser.add_argument("--shapes", type=shapes, default="16x2048,4x8192,1x32768", help="of the memory alone")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="K = V of the memory alone")
    parser.add_argument("--decode-batches", type=lambda s: [int(n) for n in s.split(",")], default="1,16,128")
    parser.add_argument("--copy-bytes", type=int, default=2**32, help="what the bandwidth is measured with")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    show = {"exact": show_exact, "memory": show_memory, "decoding": show_decoding, "training": show_training}
    for part in options.parts:
        show[part](options)
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
