"""What needles are hidden in, and how much of it makes a prompt of so many tokens."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import lru_cache
from random import Random

from hola_jax.evals.samples import Sample
from hola_jax.evals.text import Tokenizer, read_text, sha256

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = tuple(round(100 * n / 39) for n in range(40))
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+")
GROUP = 16  # prompts that are tokenised in one call

Build = Callable[[int, Random], Sample]  # (units of haystack, the sample's own randomness)


@dataclasses.dataclass(frozen=True)
class Essay:
    """A long text, cut into words; its first n words are a haystack."""

    name: str
    words: tuple[str, ...]
    hash: str

    @classmethod
    def read(cls, path: str) -> Essay:
        text = read_text(path, "the haystack")
        return cls(path, tuple(text.split()), sha256(text))

    def sentences(self, count: int) -> tuple[str, ...]:
        """Those of the first `count` words."""
        return _sentences(self.words[:count])


@lru_cache(maxsize=64)
def _sentences(words: tuple[str, ...]) -> tuple[str, ...]:
    return _cut(" ".join(words))


def _cut(text: str) -> tuple[str, ...]:
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return tuple(
        text[start:end].strip()
        for start, end in zip([0, *ends], [*ends, len(text)], strict=True)
        if text[start:end].strip()
    )


def into_sentences(sentences: tuple[str, ...], needles: list[str], depths: list[int]) -> str:
    """The text, a needle before the sentence at each depth in hundredths; the depths are in ascending order."""
    parts, start = [], 0
    for needle, depth in zip(needles, depths, strict=True):
        place = int(len(sentences) * depth / 100)
        parts += [*sentences[start:place], needle]
        start = place
    return " ".join([*parts, *sentences[start:]])


def into_lines(lines: list[str], needles: list[str], random: Random) -> str:
    """The lines, the needles among them in their order: at places drawn without repetition where there are enough."""
    count = max(len(lines), len(needles))
    places = sorted(random.sample(range(count), len(needles)))
    merged = list(lines)
    for before, (place, needle) in enumerate(zip(places, needles, strict=True)):
        merged.insert(min(place, len(lines)) + before, needle)
    return "\n".join(merged)


def depth_of(needle: str, context: str) -> float:
    """Where the needle begins, as a share of the context."""
    return context.index(needle) / max(1, len(context))


def fill(
    build: Build,
    tokenizer: Tokenizer,
    *,
    task: str,
    room: int,
    seed: int,
    samples: int,
    essay: Essay | None = None,
) -> list[Sample]:
    """Samples of at most `room` tokens, as much haystack in each as the first of them holds, or a little less.

    Each sample has randomness of its own, so that the first hundred are the same whatever number is made.
    """

    def made(number: int, units: int) -> Sample:
        return build(units, Random(f"{seed} {task} {number}"))

    def length(sample: Sample) -> int:
        return len(tokenizer.encode([sample.prompt])[0])

    least = length(made(0, 0))
    if least > room:
        raise ValueError(
            f"a prompt of {task} has {least} tokens of {tokenizer.name} without any haystack, and {room} are left of the "
            "length asked for; ask for a longer one"
        )
    most = None if essay is None else len(essay.words)
    units = _most(lambda units: length(made(0, units)) <= room, most)
    if essay is not None and units == most:
        raise ValueError(
            f"the haystack {essay.name} has {most} words, {length(made(0, units))} tokens in a prompt of {task}, fewer than "
            f"the {room} asked for; name a longer text"
        )
    found: list[Sample] = []
    for start in range(0, samples, GROUP):
        found += _fitting(made, tokenizer, range(start, min(start + GROUP, samples)), units, room, task)
    return found


def _most(fits: Callable[[int], bool], most: int | None) -> int:
    """The largest number that fits, up to `most`; 0 does."""
    low, high = 0, 1
    while (most is None or high <= most) and fits(high):
        low, high = high, 2 * high
    high = high if most is None else min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fitting(
    made: Callable[[int, int], Sample], tokenizer: Tokenizer, numbers: range, units: int, room: int, task: str
) -> list[Sample]:
    """These samples, with fewer units of haystack than `units` where their needles take more room."""
    sizes = dict.fromkeys(numbers, units)
    fitting: dict[int, Sample] = {}
    while sizes:
        tried = {number: made(number, size) for number, size in sizes.items()}
        lengths = [len(tokens) for tokens in tokenizer.encode([sample.prompt for sample in tried.values()])]
        for (number, sample), length in zip(tried.items(), lengths, strict=True):
            size = sizes.pop(number)
            if length <= room:
                fitting[number] = sample
            elif size == 0:
                raise ValueError(
                    f"prompt {number} of {task} has {length} tokens without any haystack, and {room} are left"
                )
            else:
                sizes[number] = max(0, size - max(1, size * (length - room) // length))
    return [fitting[number] for number in numbers]
