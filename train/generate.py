"""`hola generate`: a model continues what it is given, and the memory of it can be kept."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from hola_jax import Generator
from hola_jax.inference import Delta, Prefix, Request, Sampling


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model is opened: shared by `hola generate` and `hola serve`."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Of a run of `hola train`, or a Hugging Face folder."""
    step: int | None = None
    """Of the run's checkpoint; unless given, the newest."""
    tokenizer: str | None = None
    """`bytes`, `mistral-v1` or a tokenizers JSON, where the folder does not tell or the run's data are gone."""
    capacity: int | None = None
    """Tokens of a row where the mixer is "transformer"; the others have no limit."""


def opened(options: Options, width: int = 1) -> Generator:
    """The generator of a folder."""
    from train.trained import trained

    model, tokenizer = trained(options.folder, options.step, options.tokenizer)
    return Generator(model, tokenizer, capacity=options.capacity, width=width)


@dataclasses.dataclass(frozen=True)
class Generate(Options):
    """Continue prompts with a model: `hola generate FOLDER --prompt "Once upon a time"`.

    Text appears as it comes. A prompt comes from --prompt, --prompt-file, --memory (a file that --save-memory wrote, with
    or without a prompt behind it), or is typed again and again with --interactive, where the memory goes on.
    """

    prompt: tuple[str, ...] = ()
    """One or several, continued side by side; several are printed as JSON lines."""
    prompt_file: str | None = None
    """A file of UTF-8 that is one prompt; `-` is standard input."""
    interactive: bool = False
    """Read lines, continue each; the memory holds all of it. End with end-of-file."""
    memory: str | None = None
    """A saved memory to go on from."""
    save_memory: str | None = None
    """Write the memory of the prompt, as read, to this file."""
    max_tokens: int = 128
    """Of each continuation."""
    sampler: str = "sample"
    """`sample` or `greedy`."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """So many of the likeliest tokens stay; 0 keeps all."""
    top_p: float = 1.0
    """The fewest tokens whose probabilities reach this sum stay."""
    min_p: float = 0.0
    """Tokens at least so likely as this share of the likeliest stay."""
    repetition_penalty: float = 1.0
    """Above 1, what the prompt and the text hold already becomes less likely."""
    stop: tuple[str, ...] = ()
    """Strings before which the text ends."""
    seed: int = 0
    """Of the first prompt; the next has the next."""

    def run(self) -> None:
        request = self._request()
        prompts = self._prompts()
        generator = opened(self)
        prefix = None if self.memory is None else generator.load(self.memory)
        if self.interactive:
            self._converse(generator, prefix, request)
            return
        if prompts:
            prefix = generator.read(prompts, self._branched(prefix, len(prompts)))
        if prefix is None:
            raise ValueError("there is no prompt; give --prompt, --prompt-file, --memory or --interactive")
        if self.save_memory is not None:
            size = generator.save(self.save_memory, prefix)
            where = ", ".join(map(str, prefix.positions))
            print(f"hola: {self.save_memory} holds {size:,} bytes, tokens read: {where}", file=sys.stderr)
        requests = [dataclasses.replace(request, seed=self.seed + row) for row in range(len(prefix))]
        deltas = generator.stream(None, requests, prefix=prefix)
        if len(prefix) == 1:
            _show(deltas)
        else:
            _show_lines(deltas, len(prefix))

    def _request(self) -> Request:
        sampling = Sampling(
            sampler=self.sampler,  # type: ignore[arg-type]
            repetition_penalty=self.repetition_penalty,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
        )
        return Request(max_tokens=self.max_tokens, sampling=sampling, seed=self.seed, stop=self.stop)

    def _prompts(self) -> list[str | bytes]:
        if self.interactive and (self.prompt or self.prompt_file or self.save_memory):
            raise ValueError("--interactive reads its prompts; give --memory alone beside it")
        if self.prompt and self.prompt_file:
            raise ValueError("give --prompt or --prompt-file, not both")
        if self.prompt_file is None:
            return list(self.prompt)
        return [sys.stdin.buffer.read() if self.prompt_file == "-" else Path(self.prompt_file).read_bytes()]

    def _branched(self, prefix: Prefix | None, count: int) -> Prefix | None:
        """One saved row serves any number of prompts."""
        return prefix.rows([0] * count) if prefix is not None and len(prefix) == 1 else prefix

    def _converse(self, generator: Generator, prefix: Prefix | None, request: Request) -> None:
        if prefix is not None and len(prefix) > 1:
            raise ValueError(f"{self.memory} holds {len(prefix)} rows; --interactive goes on from one")
        for line in _lines():
            prefix = generator.read([line], prefix)
            tokens = _show(generator.stream(None, [request], prefix=prefix))
            written = [token for token in tokens if token not in generator.stop_tokens(request)]
            if written:
                prefix = generator.read([written], prefix)


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line:
            yield line + "\n"


def _show(deltas: Iterator[Delta]) -> list[int]:
    """Prints the text of one row as it comes; its tokens."""
    tokens: list[int] = []
    for delta in deltas:
        print(delta.text, end="", flush=True)
        tokens += delta.tokens
    print()
    return tokens


def _show_lines(deltas: Iterator[Delta], rows: int) -> None:
    texts = [""] * rows
    for delta in deltas:
        texts[delta.row] += delta.text
        if delta.finish:
            print(json.dumps({"row": delta.row, "text": texts[delta.row], "finish": delta.finish}), flush=True)
