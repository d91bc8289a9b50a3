"""Prompts in, text out: `generate`, and the `Generator` that it makes.

A prompt is read in pieces of a few fixed lengths, so what is in flight does not grow with it and nothing is compiled for a
new length. How a row is cut depends on its own length alone, and a batch is computed in a width of a power of two: a row's
numbers do not depend on what the other rows hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hola_jax.inference import programs, snapshot
from hola_jax.inference.prefix import Memory, Prefix, new_memory, width_of
from hola_jax.inference.sampling import Sampling, Settings, settings
from hola_jax.inference.text import TextStream, Tokenizer
from hola_jax.model import LanguageModel

Prompt = str | bytes | Sequence[int] | np.ndarray
Finish = Literal["stop", "length"]
PIECES = (512, 64)  # lengths in which prompts are read; see `Generator.next_piece`
WEIGHTS = 64  # tokens whose reading costs what a piece costs beside its own: what is read once for all of them
STEPS = 16  # tokens that are written between two looks of the host
STOPS = 8  # stop tokens of a row that fit without another program


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one row got in one go."""

    row: int
    text: str  # "" without a tokenizer, or while a character or a stop string may be unfinished
    tokens: list[int]  # the stop token, if one came, is the last
    finish: Finish | None = None  # why the row ended, in its last delta


@dataclasses.dataclass(frozen=True)
class Completion:
    """All that one row got: `str(completion)` is its text."""

    text: str
    tokens: list[int]
    finish: Finish
    prompt_tokens: int

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """How one row is continued.

    max_tokens   at most so many
    sampling     how each is chosen
    seed         of the draws; its lower 32 bits count
    stop         strings: the text ends before the first of them
    stop_tokens  tokens that end the row; None is the tokenizer's end of a document
    """

    max_tokens: int = 128
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.max_tokens, int) or isinstance(self.max_tokens, bool) or self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens!r}; it must be an integer of at least 1")
        if not isinstance(self.sampling, Sampling):
            raise TypeError(f"sampling is a {type(self.sampling).__name__}; it must be a hola_jax.Sampling")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed is {self.seed!r}; it must be an integer")
        if not isinstance(self.stop, tuple) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise ValueError(f"stop is {self.stop!r}; it must be a tuple of strings that are not empty")


class Generator:
    """A model made ready to continue prompts.

    tokenizer  with `encode`, `decode`, `eos` and `vocab_size`; None takes and gives tokens alone
    capacity   tokens that a row may hold where the mixer is "transformer", whose memory grows with them; None is the model's
               `max_length`. The others have no such limit
    width      rows that a batch is computed with, at least: numbers are bitwise the same within a width, and round
               differently in another
    pieces     lengths in which prompts are read, the longest first
    steps      tokens written between two looks of the host: for streamed text and stop strings
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        *,
        capacity: int | None = None,
        width: int = 1,
        pieces: Sequence[int] = PIECES,
        steps: int = STEPS,
    ) -> None:
        if not isinstance(model, LanguageModel):
            raise TypeError(f"model is a {type(model).__name__}; it must be a hola_jax.LanguageModel")
        for name, value in (("width", width), ("steps", steps), *(("pieces", piece) for piece in pieces)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} has {value!r}; it must be an integer of at least 1")
        if not pieces or list(pieces) != sorted(pieces, reverse=True):
            raise ValueError(f"pieces is {tuple(pieces)}; it must name lengths, the longest first")
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's vocabulary of "
                f"{model.config.vocab_size}; give the one that the model was trained with"
            )
        self.structure, params = nnx.split(model)
        self.config = model.config
        if capacity is not None and model.config.mixer == "transformer":
            self.config = dataclasses.replace(model.config, max_length=capacity)
            self.structure = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(self.config)))
        self.params = programs.for_inference(nnx.to_pure_dict(params), self.config.compute_dtype)
        self.tokenizer, self.width, self.steps = tokenizer, width_of(width), steps
        short = [piece for piece in pieces if self.capacity is None or piece <= self.capacity]
        self.pieces = tuple(short) or (self.capacity or 1,)

    @property
    def capacity(self) -> int | None:
        """Tokens that a row may hold; None: any number."""
        return self.config.max_length if self.config.mixer == "transformer" else None

    @cached_property
    def digest(self) -> str:
        """A fingerprint of the weights as they are used."""
        return snapshot.digest(self.params)

    def encode(self, prompt: Prompt) -> np.ndarray:
        """The prompt's tokens; one that is empty, or that the model cannot read, is refused."""
        if isinstance(prompt, bytes):
            try:
                prompt = prompt.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"the prompt is not UTF-8: {error.reason} at byte {error.start}") from None
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the prompt is text and the generator has no tokenizer; give one, or give tokens")
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise ValueError("the prompt holds half a surrogate pair, which is no character")
            tokens = np.asarray(self.tokenizer.encode([prompt])[0])
        else:
            tokens = np.asarray(prompt)
        if tokens.size == 0:
            raise ValueError("the prompt is empty; it needs at least one token")
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"the prompt is {tokens.dtype}{list(tokens.shape)}; it must be text or a list of integers")
        wrong = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)]
        if wrong.size:
            raise ValueError(f"the prompt has token {wrong[0]}; the vocabulary is 0 to {self.config.vocab_size - 1}")
        return tokens.astype(np.int32)

    def read(self, prompts: Sequence[Prompt], prefix: Prefix | None = None) -> Prefix:
        """The memory of the prompts; each goes on from its row of `prefix` where there is one."""
        return list(self.reading(prompts, prefix))[-1]

    def reading(self, prompts: Sequence[Prompt], prefix: Prefix | None = None) -> Iterator[Prefix]:
        """The same piece by piece: what stands between two pieces is used up by the next, and the last is the result."""
        if isinstance(prompts, str | bytes) or not len(prompts):
            raise ValueError("prompts must be a list of at least one prompt")
        rows = [self.encode(prompt) for prompt in prompts]
        self._check_room(_read_before(prefix, len(rows)), [len(row) for row in rows])
        memory = (
            new_memory(self.config, width_of(len(rows), self.width)) if prefix is None else self.taken(prefix).memory
        )
        for tokens, count in self._pieces(rows, memory.position.shape[0]):
            memory = programs.read(self.structure, self.params, tokens, count, memory)
            yield Prefix(memory, len(rows))

    def taken(self, prefix: Prefix) -> Prefix:
        """A copy in this generator's width, to be used up."""
        return prefix.rows(range(len(prefix)), self.width)

    def _check_room(self, before: list[int], more: list[int]) -> None:
        for row, (old, new) in enumerate(zip(before, more, strict=True)):
            if self.capacity is not None and old + new > self.capacity:
                raise ValueError(
                    f"row {row} would hold {old + new} tokens and the capacity is {self.capacity}; give "
                    "Generator(..., capacity=...) a larger one: softmax attention keeps every token"
                )

    def next_piece(self, left: int) -> int:
        """Which of `pieces` goes on where a row has so many tokens left: the longest that is filled, or that costs no more
        than the shorter ones in its place."""
        running = self.config.memory.block if self.config.mixer in ("hola", "lola") else 0  # gone over for every piece
        beside = WEIGHTS + running
        for longer, shorter in pairwise(self.pieces):
            if left >= longer or -(-left // shorter) * (shorter + beside) >= longer + beside:
                return longer
        return self.pieces[-1]

    def _pieces(self, rows: list[np.ndarray], width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens [B, T], how many of each row are real), for as many pieces as the longest row needs. How a row is cut does
        not depend on the others, so neither does how its numbers are rounded."""
        done = [0] * len(rows)
        for length in self.pieces:
            while True:
                left = [len(row) - at for row, at in zip(rows, done, strict=True)]
                counts = [min(n, length) if self.next_piece(n) == length else 0 for n in left]
                if not any(counts):
                    break
                tokens = np.zeros((width, length), np.int32)
                for row, count in enumerate(counts):
                    tokens[row, :count] = rows[row][done[row] : done[row] + count]
                    done[row] += count
                yield tokens, np.array([*counts, *[0] * (width - len(rows))], np.int32)

    def write(
        self, memory: Memory, rows: Settings, left: np.ndarray, stops: np.ndarray
    ) -> tuple[np.ndarray, Memory, np.ndarray]:
        """At most `steps` tokens more of each row: (tokens [S, B], the memory after them, what is left); see `programs`."""
        tokens, memory, after = programs.write(self.structure, self.steps, self.params, memory, rows, left, stops)
        found = np.asarray(tokens)
        if (found == programs.NOT_FINITE).any():
            row = int(np.argwhere(found == programs.NOT_FINITE)[0, 1])
            raise FloatingPointError(f"the model's logits of row {row} are NaN or infinite; are its weights whole?")
        return found, memory, np.array(after)

    def stop_tokens(self, request: Request) -> tuple[int, ...]:
        if request.stop_tokens is not None:
            return request.stop_tokens
        return () if self.tokenizer is None else (self.tokenizer.eos,)

    def check(self, request: Request, position: int) -> None:
        """Refuses what this model cannot do from there."""
        if request.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; stop_tokens do not")
        self._check_room([position], [request.max_tokens])

    def stream(
        self, prompts: Sequence[Prompt] | None = None, requests: Sequence[Request] = (), *, prefix: Prefix | None = None
    ) -> Iterator[Delta]:
        """The continuation of each row as it comes: of the prompts, of a prefix that was read or restored, or of the
        prompts behind the prefix. One request for each row."""
        if prompts is None and prefix is None:
            raise ValueError("there is nothing to continue; give prompts, a prefix, or both")
        rows = None if prompts is None else [self.encode(prompt) for prompt in prompts]
        if rows is None:
            lengths = [] if prefix is None else prefix.positions
        else:
            lengths = [at + len(row) for at, row in zip(_read_before(prefix, len(rows)), rows, strict=True)]
        if len(requests) != len(lengths):
            raise ValueError(f"there are {len(requests)} requests for {len(lengths)} rows; give one for each")
        for request, length in zip(requests, lengths, strict=True):
            self.check(request, length)
            if length == 0:
                raise ValueError("a row of the prefix is empty; read a prompt first")
        if rows is not None:
            yield from self._written(self.read(rows, prefix).memory, requests, [row.tolist() for row in rows])
        elif prefix is not None:
            yield from self._written(self.taken(prefix).memory, requests, [()] * len(requests))

    def _written(
        self, memory: Memory, requests: Sequence[Request], prompts: Sequence[Sequence[int]]
    ) -> Iterator[Delta]:
        width = memory.position.shape[0]
        rows = settings([r.sampling for r in requests], [r.seed for r in requests], width)
        writers = [Writer(self, request, prompt) for request, prompt in zip(requests, prompts, strict=True)]
        stops = stop_table([self.stop_tokens(request) for request in requests], width)
        left = np.array([*(r.max_tokens for r in requests), *[0] * (width - len(requests))], np.int32)
        while left.any():
            tokens, memory, left = self.write(memory, rows, left, stops)
            for row, writer in enumerate(writers):
                found = tokens[tokens[:, row] >= 0, row]
                if found.size:
                    text, kept = writer.take(found.tolist())
                    if writer.finish:
                        left[row] = 0
                    yield Delta(row, text, kept, writer.finish)

    def generate(
        self,
        prompts: Sequence[Prompt] | None = None,
        *,
        prefix: Prefix | None = None,
        max_tokens: int = 128,
        sampling: Sampling | Sequence[Sampling] | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
    ) -> list[Completion]:
        """A completion for each row. A single `seed` is that of the first row, the next has the next; see `Request`."""
        if isinstance(prompts, str | bytes):
            raise ValueError("prompts must be a list of prompts; hola_jax.generate takes a single one too")
        batch = len(prompts) if prompts is not None else len(prefix) if prefix is not None else 0
        samplings = [sampling or Sampling()] * batch if not isinstance(sampling, Sequence) else list(sampling)
        seeds = [seed + row for row in range(batch)] if isinstance(seed, int) else list(seed)
        for name, given in (("sampling", samplings), ("seed", seeds)):
            if len(given) != batch:
                raise ValueError(f"{name} has {len(given)} entries for {batch} rows; give one, or one for each")
        requests = [
            Request(
                max_tokens=max_tokens,
                sampling=samplings[row],
                seed=seeds[row],
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
                stop_tokens=None if stop_tokens is None else tuple(stop_tokens),
            )
            for row in range(batch)
        ]
        texts: list[list[str]] = [[] for _ in range(batch)]
        tokens: list[list[int]] = [[] for _ in range(batch)]
        finish: list[Finish] = ["length"] * batch
        rows = None if prompts is None else [self.encode(prompt) for prompt in prompts]
        for delta in self.stream(rows, requests, prefix=prefix):
            texts[delta.row].append(delta.text)
            tokens[delta.row] += delta.tokens
            finish[delta.row] = delta.finish or finish[delta.row]
        before = prefix.positions if prefix is not None else [0] * batch
        return [
            Completion(
                "".join(texts[row]), tokens[row], finish[row], before[row] + (0 if rows is None else len(rows[row]))
            )
            for row in range(batch)
        ]

    def save(self, path: str | Path, prefix: Prefix) -> int:
        """Writes the prefix's memory to a safetensors file, whole or not at all; its size in bytes."""
        return snapshot.save(Path(path), prefix, self.config, self.digest)

    def load(self, path: str | Path) -> Prefix:
        """The memory that `save` wrote, here or elsewhere; that of another model is refused."""
        return snapshot.load(Path(path), self.config, self.digest, self.width)


class Writer:
    """What a row has got so far, and whether it is done."""

    def __init__(self, generator: Generator, request: Request, prompt: Sequence[int] = ()) -> None:
        tokenizer = generator.tokenizer
        self.text = None if tokenizer is None else TextStream(tokenizer, request.stop, prompt)
        self.stop_tokens, self.left = generator.stop_tokens(request), request.max_tokens
        self.finish: Finish | None = None

    def take(self, tokens: Sequence[int]) -> tuple[str, list[int]]:
        """(the text that the tokens bring, those of them that count): what follows a stop string does not."""
        text = ""
        for number, token in enumerate(tokens):
            self.left -= 1
            if token in self.stop_tokens:
                self.finish = "stop"
            elif self.text is not None:
                text += self.text.take(token)
                self.finish = "stop" if self.text.stopped else None
            if not self.finish and not self.left:
                self.finish = "length"
            if self.finish:
                rest = "" if self.text is None else self.text.finish()
                if self.text is not None and self.text.stopped:
                    self.finish = "stop"
                return text + rest, list(tokens[: number + 1])
        return text, list(tokens)


def _read_before(prefix: Prefix | None, prompts: int) -> list[int]:
    """Tokens that each row holds before its prompt."""
    if prefix is None:
        return [0] * prompts
    if len(prefix) != prompts:
        raise ValueError(f"there are {prompts} prompts and the prefix has {len(prefix)} rows; give one for each")
    return prefix.positions


def stop_table(stops: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """The stop tokens of each row, [B, M]; -1, which is no token, fills up."""
    size = max(STOPS, width_of(max((len(row) for row in stops), default=1) or 1))
    table = np.full((width, size), -1, np.int32)
    for row, tokens in enumerate(stops):
        table[row, : len(tokens)] = list(tokens)
    return table


def generate(
    model: LanguageModel | Generator,
    prompts: Prompt | Sequence[Prompt],
    *,
    tokenizer: Tokenizer | None = None,
    max_tokens: int = 128,
    sampling: Sampling | Sequence[Sampling] | None = None,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
) -> Completion | list[Completion]:
    """The continuation of a prompt, or of each of a list of prompts.

    model       a LanguageModel, or a Generator, which also streams, and keeps and restores memories
    prompts     text where there is a tokenizer, or tokens
    max_tokens  at most so many for each
    sampling    hola_jax.Sampling(temperature=..., top_k=..., top_p=..., min_p=..., repetition_penalty=...), or
                Sampling(sampler="greedy"); a list has one for each prompt
    seed        of the first prompt; the second has the next one. Or a list
    stop        a string or strings before which the text ends; `stop_tokens` likewise, None is the end of a document
    """
    if isinstance(model, Generator) and tokenizer is not None:
        raise ValueError("a Generator has its tokenizer already; give it there, or a LanguageModel here")
    generator = model if isinstance(model, Generator) else Generator(model, tokenizer)
    single = isinstance(prompts, str | bytes) or _is_tokens(prompts)
    found = generator.generate(
        [prompts] if single else prompts,  # type: ignore[list-item, arg-type]
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
        stop=stop,
        stop_tokens=stop_tokens,
    )
    return found[0] if single else found


def _is_tokens(prompts: object) -> bool:
    if isinstance(prompts, np.ndarray | jax.Array):
        return prompts.ndim == 1 and bool(jnp.issubdtype(prompts.dtype, jnp.integer))
    return isinstance(prompts, Sequence) and len(prompts) > 0 and all(isinstance(x, int | np.integer) for x in prompts)
