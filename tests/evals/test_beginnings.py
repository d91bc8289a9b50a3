"""What prompts begin with together is read once, and their continuations are what each has alone."""

import threading
import weakref

import numpy as np
import pytest

from hola_jax import Generator
from hola_jax.evals import ModelScorer
from hola_jax.evals.beginnings import beginnings, tokens_read
from hola_jax.inference import programs
from tests.evals.small import model
from tests.evals.test_scorer import greedily, rows

PIECE = 32
TRUNK, OTHER = rows((80, 70), seed=3)


def behind(start, length, seed):
    return np.concatenate([start, *rows((length,), seed)])


PROMPTS = {
    "nothing": rows((40, 3, 33, 60), seed=1),
    "parting within a piece": [behind(TRUNK[:70], 5, 4), behind(TRUNK[:75], 9, 5), behind(TRUNK[:40], 30, 6)],
    "several beginnings": [behind(x[:n], 7, n) for x in (OTHER, TRUNK) for n in (33, 65, 70)] + rows((5,)),
    "one is the beginning of another": [TRUNK[:n] for n in (80, 32, 64, 65)],
    "identical": [TRUNK[:70]] * 3,
    "none": [],
}
# Tokens that each of the above has read by the plan: the pieces that two or more have, then each one's own rest.
READ = {
    "nothing": 40 + 3 + 33 + 60,
    "parting within a piece": 64 + (75 - 64) + (84 - 64) + (70 - 32),
    "several beginnings": 2 * (64 + (40 - 32) + (72 - 64) + (77 - 64)) + 5,
    "one is the beginning of another": 64 + (80 - 64) + 32 + (64 - 32) + (65 - 64),
    "identical": 64 + 3 * (70 - 64),
    "none": 0,
}


def watch(monkeypatch):
    """The shapes that go through the program that reads, and how many of their tokens are real."""
    calls, read = [], programs.read

    def watched(structure, params, tokens, count, memory):
        calls.append((tokens.shape, int(np.sum(count))))
        return read(structure, params, tokens, count, memory)

    monkeypatch.setattr(programs, "read", watched)
    return calls


@pytest.mark.parametrize("mixer", ["hola", "transformer"])
def test_prompts_that_share_a_beginning_continue_as_each_does_alone(mixer, monkeypatch):
    lm, told = model(mixer), []
    scorer = ModelScorer(lm, piece=PIECE, batch_tokens=128)
    for name, prompts in PROMPTS.items():
        with monkeypatch.context() as patch:
            calls = watch(patch)
            found = scorer.greedy(prompts, 8, done=told.append)
        assert sum(count for _, count in calls) == tokens_read(beginnings(prompts, PIECE), prompts) == READ[name], name
        for prompt, generated in zip(prompts, found, strict=True):
            np.testing.assert_array_equal(generated, greedily(lm, prompt, generated), name)
    assert sum(told) == sum(map(len, PROMPTS.values()))


def test_prompts_without_a_common_beginning_go_in_full_batches(monkeypatch):
    calls = watch(monkeypatch)
    ModelScorer(model(), piece=PIECE, batch_tokens=128).greedy(rows((40, 3, 33, 60, 64, 30, 50, 45), seed=1), 8)
    assert [shape for shape, _ in calls] == [(4, PIECE)] * 4


def test_more_prompts_are_continued_together_than_are_read_at_a_time(monkeypatch):
    calls = watch(monkeypatch)
    told, prompts = [], [behind(TRUNK[:64], 5, n) for n in range(5)]
    ModelScorer(model(), piece=64, batch_tokens=64, rows=4).greedy(prompts, 8, done=told.append)
    assert [shape for shape, _ in calls] == [(1, 32)] * 7
    assert told == [4, 1]


def test_a_cpu_is_given_two_rows_to_read_at_once(monkeypatch):
    meeting, read = threading.Barrier(2), programs.read

    def met(*given):
        meeting.wait(timeout=60)
        return read(*given)

    lm, prompts = model(), rows((20, 25, 30, 21), seed=1)
    monkeypatch.setattr(programs, "read", met)
    for prompt, generated in zip(prompts, ModelScorer(lm, piece=PIECE).greedy(prompts, 2), strict=True):
        np.testing.assert_array_equal(generated, greedily(lm, prompt, generated))


def test_a_batch_holds_no_more_memories_than_have_room():
    small, large = ModelScorer(model()), ModelScorer(model("transformer", max_length=1 << 24))
    assert (small.rows, large.rows) == (32, 1)


def test_every_prompt_stands_once_in_the_tree_and_has_a_token_left():
    for prompts in PROMPTS.values():
        stack, found = [beginnings(prompts, PIECE)], []
        while stack:
            here = stack.pop()
            assert here.length % PIECE == 0 and all(len(prompts[n]) > here.length for n in here.alone)
            found += here.alone
            stack += here.longer
        assert sorted(found) == list(range(len(prompts)))


def test_few_memories_are_kept(monkeypatch):
    """Along a trunk which a prompt leaves at each piece: those of a batch of 4, those that wait for one, and the newest."""
    trunk, kept, most = np.concatenate(rows([PIECE] * 12)), [], 0
    read = Generator.read

    def watched(self, prompts, prefix=None):
        nonlocal most
        found = read(self, prompts, prefix)
        if len(prompts) == 1:
            kept.append(weakref.ref(found))
            most = max(most, sum(each() is not None for each in kept))
        return found

    monkeypatch.setattr(Generator, "read", watched)
    prompts = [behind(trunk[: n * PIECE], 5, n) for n in range(1, 13)]
    ModelScorer(model(), piece=PIECE, batch_tokens=128, rows=4).greedy(prompts, 8)
    assert len(kept) == 11 and most <= 4 + 3 + 1
