"""What inference costs: `python benchmarks/inference.py`, or `--help`. One table for each question:

decode   milliseconds per token behind a short and a long context, and a Transformer of the same size beside it
memory   peak memory of reading a short and a long prompt, each in a process of its own
host     what the host adds to a token: text, stop strings, streaming
server   tokens per second with every slot of the batcher busy, over those of one slot
batch    tokens per second for batches of several widths

The contenders of a table take turns in one process, so that a machine whose speed drifts slows all of them; times are
medians. `--preset tiny --contexts 64 512` shows in a minute what the tables look like.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from hola_jax import Generator, LanguageModel, preset
from hola_jax.inference import GREEDY, Request, programs
from hola_jax.inference.batcher import Batcher, Job
from hola_jax.inference.generator import stop_table
from hola_jax.inference.prefix import Memory, new_memory
from hola_jax.inference.sampling import settings


class Numbers:
    """A tokenizer for made-up tokens: decoding costs what a table look-up does."""

    def __init__(self, size: int) -> None:
        self.vocab_size, self.eos = size, size - 1
        self.words = [f" {number}" for number in range(size)]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([int(word) for word in text.split()], np.int32) for text in texts]

    def decode(self, tokens: Any) -> str:
        return "".join(self.words[token] for token in tokens)


def generator(name: str, steps: int, capacity: int | None = None) -> Generator:
    model = LanguageModel(preset(name))
    return Generator(model, Numbers(model.config.vocab_size), capacity=capacity, steps=steps)


def prompt(g: Generator, tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(g.config.vocab_size - 1, size=tokens)


def behind(g: Generator, context: int, rows: int = 1) -> Memory:
    """The memory behind so many tokens. A Transformer's is made up: how long a token takes does not depend on its numbers,
    and to read 128k tokens takes it hours on a CPU."""
    if g.config.mixer != "transformer":
        return g.read([prompt(g, context)] * rows).memory
    memory = new_memory(g.config, rows)
    state = memory.state
    documents = jnp.broadcast_to(
        (jnp.arange(state.documents.shape[2]) < context).astype(jnp.int32), state.documents.shape
    )
    state = state._replace(documents=documents, position=jnp.full_like(state.position, context))
    return dataclasses.replace(memory, state=state, position=jnp.full_like(memory.position, context))


class Decoding:
    """`steps` tokens of every row in one call; the memory goes on from call to call."""

    def __init__(self, g: Generator, memory: Memory) -> None:
        width = memory.position.shape[0]
        self.g, self.memory, self.width = g, memory, width
        self.rows, self.stops = settings([GREEDY] * width, [0] * width, width), stop_table([()] * width, width)
        self.left = np.full(width, 10**6, np.int32)

    def __call__(self) -> float:
        """Seconds per token of a row."""
        g, start = self.g, time.perf_counter()
        tokens, self.memory, _ = programs.write(
            g.structure, g.steps, g.params, self.memory, self.rows, self.left, self.stops
        )
        tokens.block_until_ready()
        return (time.perf_counter() - start) / g.steps


def in_turn(runs: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, float]:
    """The median of what each gives, after one call that does not count."""
    for run in runs.values():
        run()
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run())
    return {name: statistics.median(found) for name, found in times.items()}


def decode(options: argparse.Namespace) -> None:
    steps = options.steps
    models = {"hola": generator(f"hola-{options.preset}", steps), "gdn": generator(f"gdn-{options.preset}", steps)}
    runs: dict[Any, Callable[[], float]] = {
        (name, context): Decoding(g, behind(g, context)) for name, g in models.items() for context in options.contexts
    }
    room = (options.rounds + 1) * steps
    for context in options.transformer:
        g = generator(f"transformer-{options.preset}", steps, context + room)
        runs["transformer", context] = Decoding(g, behind(g, context))
    found = in_turn(runs, options.rounds)
    print(f"\ndecode: milliseconds per token, {options.preset}, one row, {jax.devices()[0].device_kind}")
    for (name, context), seconds in found.items():
        print(f"  {name:12} {context:>8,} tokens {1e3 * seconds:10.3f}")
    short, long = min(options.contexts), max(options.contexts)
    print(f"  hola at {long:,} / at {short:,}: {found['hola', long] / found['hola', short]:.3f}")
    slower = [c for c in sorted(options.transformer) if found["transformer", c] > found["hola", short]]
    where = f"from {slower[0]:,} tokens on" if slower else f"nowhere up to {max(options.transformer):,} tokens"
    print(f"  hola is faster than the Transformer {where} (of {', '.join(f'{c:,}' for c in options.transformer)})")


def memory(options: argparse.Namespace) -> None:
    print(f"\nmemory: peak of reading a prompt, {options.preset}, MiB")
    for row in options.memory_rows:
        peaks = {}
        for context in options.memory_contexts:
            command = [sys.executable, __file__, "--one", f"{row}-{options.preset}", str(context)]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks[context] = int(told.split()[-1])
            print(f"  {row:12} {context:>8,} tokens {peaks[context] / 2**20:12.1f}", flush=True)
        print(f"  {row} at {max(peaks):,} / at {min(peaks):,}: {peaks[max(peaks)] / peaks[min(peaks)]:.3f}")


def peak_of_reading(name: str, context: int) -> int:
    """Bytes: of the device where it tells, else of this process (Linux)."""
    g = generator(name, 16)
    g.read([prompt(g, context)]).memory.logits.block_until_ready()
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    # Not getrusage's maximum: a child begins with that of its parent.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def host(options: argparse.Namespace) -> None:
    g = generator(f"hola-{options.preset}", 16)
    count = 16 * options.calls
    prefix = g.read([prompt(g, 64)])
    request = Request(max_tokens=count, sampling=GREEDY, stop=("no such words",), stop_tokens=())

    def streamed() -> float:
        start = time.perf_counter()
        for _ in g.stream(None, [request], prefix=prefix):
            pass
        return (time.perf_counter() - start) / count

    def called() -> float:
        decoding = Decoding(g, g.taken(prefix).memory)
        jax.block_until_ready(decoding.memory)
        return statistics.mean(decoding() for _ in range(options.calls))

    found = in_turn({"streamed": streamed, "the compiled calls alone": called}, options.rounds)
    print(f"\nhost: milliseconds per token, hola-{options.preset}, {count} tokens in pieces of 16")
    for name, seconds in found.items():
        print(f"  {name:26} {1e3 * seconds:10.3f}")
    outside, inside = found.values()
    print(f"  the host adds {outside / inside - 1:+.1%}")


def server(options: argparse.Namespace) -> None:
    g = generator(f"hola-{options.preset}", 16)
    request = Request(max_tokens=options.tokens, sampling=GREEDY, stop_tokens=())

    def served(batcher: Batcher, jobs: int) -> float:
        left, done = [jobs], threading.Event()

        def deliver(what: Any) -> None:
            if isinstance(what, Exception):
                raise what
            left[0] -= what.finish is not None
            if not left[0]:
                done.set()

        start = time.perf_counter()
        batcher.submit([Job(prompt(g, 64).astype(np.int32), request, deliver, row) for row in range(jobs)])
        done.wait()
        return (time.perf_counter() - start) / (jobs * options.tokens)

    batchers = {slots: Batcher(g, slots) for slots in (1, options.slots)}
    for batcher in batchers.values():
        batcher.warm_up()
    runs: dict[Any, Callable[[], float]] = {n: lambda n=n, b=b: served(b, n) for n, b in batchers.items()}  # type: ignore[misc]
    found = in_turn(runs, options.rounds)
    print(f"\nserver: tokens per second, hola-{options.preset}, {options.tokens} tokens behind prompts of 64")
    for slots, seconds in found.items():
        print(f"  {slots:3} slots {1 / seconds:12.1f}")
    print(f"  {options.slots} slots / 1: {found[1] / found[options.slots]:.2f}")
    for batcher in batchers.values():
        batcher.close()


def batch(options: argparse.Namespace) -> None:
    print(f"\nbatch: tokens per second of all rows, {options.preset}, behind {min(options.contexts):,} tokens")
    for row in ("hola", "gdn", "transformer"):
        capacity = min(options.contexts) + (options.rounds + 1) * options.steps
        g = generator(f"{row}-{options.preset}", options.steps, capacity)
        for rows in options.rows:
            seconds = in_turn({rows: Decoding(g, behind(g, min(options.contexts), rows))}, options.rounds)[rows]
            print(f"  {row:12} {rows:4} rows {rows / seconds:12.1f}", flush=True)


TABLES = {"decode": decode, "memory": memory, "host": host, "server": server, "batch": batch}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; none is all but batch")
    parser.add_argument("--preset", default="46m", help="the scale: tiny, 46m, 170m, 340m")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 131072])
    parser.add_argument("--transformer", type=int, nargs="+", default=[512, 2048, 8192, 32768], help="its contexts")
    parser.add_argument("--memory-contexts", type=int, nargs="+", default=[8192, 131072])
    parser.add_argument("--memory-rows", nargs="+", default=["hola", "gdn"])
    parser.add_argument("--steps", type=int, default=32, help="tokens of a call that is timed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=8, help="pieces of 16 tokens that the table host streams")
    parser.add_argument("--tokens", type=int, default=128, help="of each of the server's answers")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(peak_of_reading(options.one[0], int(options.one[1])))
        return
    unknown = set(options.tables) - set(TABLES)
    if unknown:
        parser.error(f"there is no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    for name in options.tables or [name for name in TABLES if name != "batch"]:
        TABLES[name](options)


if __name__ == "__main__":
    main()
