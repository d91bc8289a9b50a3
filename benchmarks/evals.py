"""What an evaluation costs: `python benchmarks/evals.py samples|loglikelihood|needles`, or `--help`.

samples        makes samples of RULER at a length, for each task
loglikelihood  tokens per second of the batched scorer beside those of the training loss's forward pass, on the same rows
needles        a hundred samples of S-NIAH-1, answered by a model with random numbers, beginnings that they share read once
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hola_jax import LanguageModel, preset
from hola_jax.evals import ModelScorer, ruler
from hola_jax.evals.beginnings import beginnings, tokens_read
from hola_jax.evals.haystack import Essay
from hola_jax.losses import chunked_loss
from hola_jax.model import Params
from train.data import tokenizers


def samples(options: Any) -> None:
    """Seconds to make them, by the clock and of the processor: on a busy machine they differ."""
    tokenizer = tokenizers.load(options.tokenizer)
    essay = Essay.read(options.haystack) if options.haystack else None
    for task in ruler.TASKS:
        if ruler.needs_essay(task) and essay is None:
            print(f"{task:10} needs --haystack FILE")
            continue
        wall, processor = time.perf_counter(), time.process_time()
        made = ruler.make(
            task, length=options.length, samples=options.samples, seed=42, tokenizer=tokenizer, essay=essay
        )
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        print(
            f"{task:10} {len(made)} x {options.length} tokens: {wall:6.1f} s, {processor:6.1f} s of processor time",
            flush=True,
        )


def loglikelihood(options: Any) -> None:
    """Rounds of both in turn, the median of each."""
    model = made_model(options)
    draw = np.random.default_rng(0)
    rows = draw.integers(model.config.vocab_size, size=(options.rows, options.length + 1)).astype(np.int32)
    structure, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    scorer = ModelScorer(model, batch_tokens=options.batch_tokens)
    mask = jnp.ones((options.rows, options.length), bool)

    @jax.jit
    def loss(params: Params, rows: jax.Array) -> jax.Array:
        hidden, _ = nnx.merge(structure, params).hidden(rows[:, :-1])
        return chunked_loss(hidden, params["embedding"], rows[:, 1:], mask).nll

    works = {
        "training forward": lambda: float(loss(params, rows)),
        "loglikelihood": lambda: -sum(float(found.logprob.sum()) for found in scorer.loglikelihood(list(rows))),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(options.rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            total = work()
            if number:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
            else:
                print(f"{name:17} {total / rows[:, 1:].size:.4f} nats a token")
    for name, times in seconds.items():
        print(f"{name:17} {rows[:, 1:].size / statistics.median(times):10,.0f} tokens/s (seconds {times})")
    ratio = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"loglikelihood takes {statistics.median(ratio):.2f} x the time of the training forward")


def needles(options: Any) -> None:
    """With compilation. How much is shared grows with the samples, so a few do not tell what many take."""
    model, tokenizer = made_model(options), tokenizers.load(options.tokenizer)
    made = ruler.make("s_niah_1", length=options.length, samples=options.samples, seed=42, tokenizer=tokenizer)
    prompts = tokenizer.encode([sample.prompt for sample in made])
    scorer = ModelScorer(model, batch_tokens=options.batch_tokens)
    read, total = tokens_read(beginnings(prompts, scorer.shared_piece), prompts), sum(map(len, prompts))
    print(f"{len(prompts)} prompts of {total:,} tokens; {read:,} of them are read ({read / total:.1%})", flush=True)
    answered, start, processor = 0, time.perf_counter(), time.process_time()

    def done(rows: int) -> None:
        nonlocal answered
        answered += rows
        wall, spent = time.perf_counter() - start, time.process_time() - processor
        print(f"{answered} answered: {wall / 60:.1f} minutes, {spent / 60:.1f} of processor time", flush=True)

    scorer.greedy(prompts, ruler.generated("s_niah_1"), done=done)


def made_model(options: Any) -> LanguageModel:
    return LanguageModel(dataclasses.replace(preset(options.preset), dtype=options.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("samples", "loglikelihood", "needles"))
    parser.add_argument("--preset", default="hola-46m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokenizer", default="mistral-v1")
    parser.add_argument("--haystack", help="a long text, for the tasks that hide needles in one")
    parser.add_argument(
        "--length", type=int, help="tokens; 32768 for samples, 2048 for loglikelihood, 8192 for needles"
    )
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, help="that go through the model at a time; as ModelScorer has it")
    options = parser.parse_args()
    usual = {"samples": (samples, 32768), "loglikelihood": (loglikelihood, 2048), "needles": (needles, 8192)}
    action, length = usual[options.what]
    options.length = options.length or length
    print(f"{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}: jax {jax.__version__}, {jax.devices()[0].device_kind}")
    action(options)


if __name__ == "__main__":
    main()
