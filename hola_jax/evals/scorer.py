"""What an evaluation asks of a model, and a model that answers: log-probabilities of given tokens, and greedy continuations.

`ModelScorer` scores by the model's own call, rows going through it in pieces of fixed length with the state handed on, so
neither memory nor the number of compiled programs grows with the length of a row; it continues by `hola_jax.Generator`, and
what prompts begin with together is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from hola_jax.array_types import Array
from hola_jax.config import ModelConfig
from hola_jax.evals.beginnings import Beginning, beginnings
from hola_jax.inference import GREEDY, Generator, Prefix, Request
from hola_jax.inference.prefix import joined, new_memory
from hola_jax.model import LanguageModel, Params, State, init_state, state_bytes

Done = Callable[[int], None]  # told how many rows are finished since the last time
Until = Callable[[int, np.ndarray], bool]  # (number of the prompt, its tokens so far): whether they are enough

SHORTEST = 32  # tokens of a piece
BATCH_TOKENS = 8192  # on an accelerator; a CPU reads no faster when it is given more than a piece
AT_A_TIME = 2  # batches that a CPU is busy with
ROWS, MEMORIES = 32, 4 << 30  # prompts that are continued together, and bytes of their memories, at most


class Scored(NamedTuple):
    """Of a row of n tokens: what the model made of each token but the first, given those before it."""

    logprob: np.ndarray  # float32 [n - 1]
    greedy: np.ndarray  # bool [n - 1]: whether it was the likeliest


class Batch(NamedTuple):
    """Rows of about one length that go through the model together."""

    numbers: list[int]
    pieces: list[tuple[int, int]]  # (start, length)
    size: int  # rows, some of which may be empty


class Rest(NamedTuple):
    """What is left to read of a prompt."""

    number: int
    tokens: np.ndarray
    memory: Prefix | None  # of the tokens before them, in one row; None where there are none


A = TypeVar("A")
B = TypeVar("B")


class Scorer(Protocol):
    """All that an evaluation asks of a model."""

    vocab_size: int
    longest: int | None
    """Tokens that a row may have; None: any number."""

    def loglikelihood(self, rows: Sequence[np.ndarray], done: Done = ...) -> list[Scored]: ...

    def greedy(
        self, prompts: Sequence[np.ndarray], max_tokens: int, until: Until | None = None, done: Done = ...
    ) -> list[np.ndarray]: ...


def _ignore(_: int) -> None:
    pass


class ModelScorer:
    """A language model as a Scorer.

    piece        tokens of a row that go through the model at a time
    batch_tokens tokens of all rows that do; None is 8192, and a piece on a CPU, which is given two such calls at once
    head_tokens  tokens whose logits exist at a time
    rows         prompts that are continued together; None is 32, or fewer where their memories would have over 4 GiB
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        piece: int = 1024,
        batch_tokens: int | None = None,
        head_tokens: int = 1024,
        rows: int | None = None,
    ) -> None:
        if batch_tokens is None:
            batch_tokens = piece if jax.default_backend() == "cpu" else BATCH_TOKENS
        if rows is None:
            rows = max(1, min(ROWS, MEMORIES // state_bytes(model.config)))
        for name, value, least in (
            ("piece", piece, SHORTEST),
            ("batch_tokens", batch_tokens, 1),
            ("head_tokens", head_tokens, 1),
            ("rows", rows, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.config: ModelConfig = model.config
        self.vocab_size = model.config.vocab_size
        self.longest = model.config.max_length if model.config.mixer == "transformer" else None
        self.piece, self.batch_tokens, self.rows = piece, batch_tokens, rows
        structure, params = nnx.split(model)
        self.model, self.params = model, nnx.to_pure_dict(params)
        self._score = jax.jit(partial(_score, structure, head_tokens))

    def loglikelihood(self, rows: Sequence[np.ndarray], done: Done = _ignore) -> list[Scored]:
        """For each row of at least two tokens, its tokens after the first, scored."""
        self._check(rows, least=2, more=0)
        found: dict[int, Scored] = {}
        batches = self._batches([len(row) - 1 for row in rows])
        for scored in _each(partial(self._scored, rows), batches):
            found |= scored
            done(len(scored))
        return [found[n] for n in range(len(rows))]

    def _scored(self, rows: Sequence[np.ndarray], batch: Batch) -> dict[int, Scored]:
        numbers, pieces, size = batch
        state, parts = init_state(self.config, size), []
        for start, length in pieces:
            tokens = _padded([rows[n][:-1][start : start + length] for n in numbers], size, length)
            targets = _padded([rows[n][1:][start : start + length] for n in numbers], size, length)
            part, state = self._score(self.params, tokens, targets, state)
            parts.append(part)
        logprob, greedy = (np.concatenate([np.asarray(part[n]) for part in parts], axis=1) for n in range(2))
        ends = [len(rows[n]) - 1 for n in numbers]
        return {
            n: Scored(logprob[at, :end], greedy[at, :end])
            for at, (n, end) in enumerate(zip(numbers, ends, strict=True))
        }

    def greedy(
        self, prompts: Sequence[np.ndarray], max_tokens: int, until: Until | None = None, done: Done = _ignore
    ) -> list[np.ndarray]:
        """The likeliest continuation of each prompt: `max_tokens` tokens, or fewer where `until` says so."""
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
        self._check(prompts, least=1, more=max_tokens)
        request = Request(max_tokens=max_tokens, sampling=GREEDY, stop_tokens=())
        found: dict[int, np.ndarray] = {}
        for batch in self._rests(prompts):
            numbers = [rest.number for rest in batch]
            tokens: list[list[int]] = [[] for _ in batch]
            read = self._read(batch, self._rows(max(len(prompts[n]) for n in numbers)))
            for delta in self._generator.stream(None, [request] * len(batch), prefix=read):
                tokens[delta.row] += delta.tokens
                # The last row of a round: no row is ahead of another.
                if delta.row == len(batch) - 1 and _enough(until, numbers, tokens):
                    break
            found |= {n: np.array(each, np.int32) for n, each in zip(numbers, tokens, strict=True)}
            done(len(numbers))
        return [found[n] for n in range(len(prompts))]

    @cached_property
    def _generator(self) -> Generator:
        return Generator(self.model, pieces=sorted({self.piece, self.shared_piece, SHORTEST}, reverse=True))

    @property
    def shared_piece(self) -> int:
        """Tokens of the pieces that prompts share: the shorter, the more they share, and the more calls for a beginning."""
        return max(self.piece // 4, SHORTEST)

    def _rests(self, prompts: Sequence[np.ndarray]) -> Iterator[list[Rest]]:
        """Batches of rests of about one length, what prompts share being read on the way to them.

        The memories that are kept are few: those of a batch, fewer that wait for one to be full, and those that beginnings
        still to be read go on from. That of the most prompts comes last: each that is kept for it halves the prompts.
        """
        waiting: list[Rest] = []
        stack: list[tuple[Beginning, Prefix | None]] = [(beginnings(prompts, self.shared_piece), None)]
        while stack:
            here, memory = stack.pop()
            if here.length:
                memory = self._generator.read([here.tokens], memory)
            waiting += [Rest(n, prompts[n][here.length :], memory) for n in here.alone]
            waiting.sort(key=lambda rest: -len(rest.tokens))
            stack += [(longer, memory) for longer in here.longer]
            while waiting:
                if stack and len(waiting) < self.rows:
                    break
                batch, waiting = waiting[: self.rows], waiting[self.rows :]
                yield batch

    def _read(self, batch: list[Rest], together: int) -> Prefix:
        """The memory of the whole prompts, so many of which go through the model at a time."""

        def read(part: list[Rest]) -> Prefix:
            found = self._generator.read([rest.tokens for rest in part], self._before(part))
            jax.block_until_ready(found.memory)  # else all would be begun at once
            return found

        return joined(list(_each(read, (batch[n : n + together] for n in range(0, len(batch), together)))))

    def _before(self, batch: list[Rest]) -> Prefix | None:
        """What is before the rests, a row for each."""
        if all(rest.memory is None for rest in batch):
            return None
        nothing = Prefix(new_memory(self._generator.config, 1), 1)
        return joined([rest.memory or nothing for rest in batch])

    def _rows(self, length: int) -> int:
        """Rows of a batch whose longest has so many tokens."""
        return max(1, self.batch_tokens // self._pieces(length)[0][1])

    def _batches(self, lengths: list[int]) -> Iterator[Batch]:
        order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
        while order:
            pieces = self._pieces(lengths[order[0]])
            most = self._rows(lengths[order[0]])
            numbers, order = order[:most], order[most:]
            yield Batch(numbers, pieces, min(most, 1 << (len(numbers) - 1).bit_length()))

    def _pieces(self, length: int) -> list[tuple[int, int]]:
        """Whole pieces, and a last one of one of a few lengths: each length is a program to compile."""
        whole, rest = divmod(length, self.piece)
        pieces = [(n * self.piece, self.piece) for n in range(whole)]
        if rest:
            sizes = sorted(SHORTEST * factor * 2**n // 2 for n in range(20) for factor in (2, 3))
            fitting = next(size for size in sizes if size >= rest)
            pieces.append((whole * self.piece, min(fitting, self.piece)))
        return pieces

    def _check(self, rows: Sequence[np.ndarray], least: int, more: int) -> None:
        for number, row in enumerate(rows):
            if len(row) < least:
                raise ValueError(f"row {number} has {len(row)} tokens; it must have at least {least}")
            if self.longest is not None and len(row) + more > self.longest:
                raise ValueError(
                    f"row {number} has {len(row)} tokens{f' and {more} to generate' if more else ''}, and this "
                    f"{self.config.mixer} holds {self.longest} (max_length); ask for shorter ones"
                )
            if row.min() < 0 or row.max() >= self.vocab_size:
                raise ValueError(
                    f"row {number} has the token {row.min() if row.min() < 0 else row.max()}; the model's vocabulary has "
                    f"{self.vocab_size}"
                )


def _each(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """work(item) of each, in order, and on a CPU two at a time: one program alone leaves cores waiting."""
    if jax.default_backend() != "cpu":
        yield from map(work, items)
        return
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield from pool.map(work, items)


def _padded(rows: list[np.ndarray], size: int, length: int) -> np.ndarray:
    tokens = np.zeros((size, length), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    return tokens


def _enough(until: Until | None, numbers: list[int], tokens: list[list[int]]) -> bool:
    return until is not None and all(until(n, np.array(each)) for n, each in zip(numbers, tokens, strict=True))


def _score(
    structure: Any, head_tokens: int, params: Params, tokens: Array, targets: Array, state: State
) -> tuple[tuple[Array, Array], State]:
    """((logprob, greedy) [B, T] of the targets, the state after the tokens). Padding stands at the end, unseen."""
    model = nnx.merge(structure, params)
    hidden, state = model.hidden(tokens, state=state)
    count = tokens.size
    size = min(head_tokens, count)

    def in_parts(x: Array) -> Array:
        x = x.reshape(count, *x.shape[2:])
        x = jnp.pad(x, [(0, -count % size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:])

    def part(hidden_and_targets: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = hidden_and_targets
        logits = model.head(hidden)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == targets

    found = lax.map(part, (in_parts(hidden), in_parts(targets)))
    logprob, greedy = (x.reshape(-1)[:count].reshape(tokens.shape) for x in found)
    return (logprob, greedy), state
