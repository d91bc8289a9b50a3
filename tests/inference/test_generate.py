"""Prompts in, tokens out: seeds, stops, streams, rows, and what is refused."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import hola_jax
from hola_jax import Generator, LanguageModel, MemoryConfig, Sampling
from hola_jax.inference import GREEDY, Completion, Request
from tests.inference.models import generator, model
from tests.laws.mixers import small
from train.data.tokenizers import Bytes

LONG = "It was the best of times, it was the worst"  # 42 bytes: three pieces, the last not full


def logits(prefix: hola_jax.inference.Prefix) -> np.ndarray:
    return np.asarray(prefix.memory.logits)[: len(prefix)]


def test_a_draw_depends_on_its_own_seed_and_place_alone() -> None:
    g, how = generator(), Sampling(temperature=1.5, top_k=200, top_p=0.99)
    both = g.generate([LONG, "ab"], max_tokens=10, sampling=how, seed=[7, 8])
    assert both[1] == g.generate(["ab"], max_tokens=10, sampling=how, seed=8)[0]
    assert both[0] == g.generate(["ab", LONG], max_tokens=10, sampling=[GREEDY, how], seed=[8, 7])[1]
    assert both[1].tokens != g.generate(["ab"], max_tokens=10, sampling=how, seed=9)[0].tokens
    # Half of it, read and continued, is all of it: keys come from the seed and the position.
    first = g.generate(["ab"], max_tokens=4, sampling=how, seed=8)[0]
    more = g.generate([[97, 98, *first.tokens]], max_tokens=6, sampling=how, seed=8)[0]
    assert first.tokens + more.tokens == both[1].tokens


def test_a_second_call_compiles_nothing() -> None:
    compiled: list[str] = []

    def listen(name: str, seconds: float, **_: Any) -> None:
        if name.endswith("backend_compile_duration"):
            compiled.append(name)

    g = generator()
    g.generate([LONG, "a"], max_tokens=6)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 3)(1).block_until_ready()
        assert len(compiled) == 1  # the counter counts
        g.generate([LONG[:30]], max_tokens=9, sampling=Sampling(min_p=0.1, repetition_penalty=1.2), stop=["x", "yz"])
        g.generate(["a", "b" * 20], max_tokens=1, sampling=GREEDY, stop_tokens=[3])
        again = Generator(model(), Bytes(), pieces=g.pieces, steps=g.steps, width=2)
        again.generate(["another generator"], max_tokens=2)
        assert len(compiled) == 1
    finally:
        jax.monitoring.clear_event_listeners()


def test_stop_tokens_end_a_row_and_only_it() -> None:
    g = generator()
    free = g.generate(["ab", LONG], max_tokens=9, sampling=GREEDY, stop_tokens=[])
    stop = free[0].tokens[2]
    found = g.generate(["ab", LONG], max_tokens=9, sampling=GREEDY, stop_tokens=[stop])
    cut = free[0].tokens.index(stop) + 1
    assert (found[0].tokens, found[0].finish) == (free[0].tokens[:cut], "stop")
    expected = free[1].tokens[: free[1].tokens.index(stop) + 1] if stop in free[1].tokens else free[1].tokens
    assert found[1].tokens == expected and free[1].finish == "length"


def test_streamed_text_is_the_text() -> None:
    g = generator()
    requests = [Request(max_tokens=11, seed=row) for row in (0, 1)]
    texts, ends = ["", ""], [0, 0]
    for delta in g.stream([LONG, "é"], requests):
        texts[delta.row] += delta.text
        ends[delta.row] += delta.finish is not None
    assert texts == [completion.text for completion in g.generate([LONG, "é"], max_tokens=11)] and ends == [1, 1]


def test_five_lines_in_a_notebook() -> None:
    one = hola_jax.generate(generator(), "to be", max_tokens=3)
    assert isinstance(one, Completion) and one.prompt_tokens == 5 and str(one) == one.text
    assert hola_jax.generate(generator(), ["to be"], max_tokens=3) == [one]
    assert hola_jax.generate(generator(), np.frombuffer(b"to be", np.uint8), max_tokens=3) == one


def test_softmax_attention_has_a_capacity() -> None:
    g = Generator(model("transformer"), Bytes(), capacity=24, pieces=(16,), steps=4, width=2)
    assert g.generate(["a" * 20], max_tokens=4, stop_tokens=[])[0].finish == "length"
    with pytest.raises(ValueError, match="row 0 would hold 25 tokens and the capacity is 24"):
        g.generate(["a" * 20], max_tokens=5)
    assert generator().capacity is None


def test_matrices_in_bfloat16_change_no_logit() -> None:
    half = LanguageModel(small("hola", vocab_size=256, dtype="bfloat16", layers=1), seed=1)
    g = Generator(half, pieces=(16,), steps=4, width=2)
    tokens = np.arange(16, dtype=np.int32)
    whole, _ = half(tokens[None], state=half.init_state(1))
    np.testing.assert_allclose(logits(g.read([tokens]))[0], whole[0, -1], atol=2e-2)  # rows of two round otherwise
    assert {str(x.dtype) for x in jax.tree.leaves(g.params["blocks"]["mlp"])} == {"bfloat16"}


def test_logits_that_are_not_finite_are_an_error() -> None:
    broken = Generator(model(), pieces=(16,), steps=4, width=2)
    broken.params = {**broken.params, "norm": jax.tree.map(lambda x: x * np.nan, broken.params["norm"])}
    with pytest.raises(FloatingPointError, match="row 0 are NaN or infinite"):
        broken.generate([[1, 2]], max_tokens=2)


def test_rows_are_branched_inserted_and_dropped() -> None:
    g = generator()
    prefix = g.read([LONG, "ab"])
    edited = prefix.rows([1, 0, 1]).insert(1, g.read(["xyz"])).drop(0)
    assert edited.positions == [3, 42, 2] and prefix.positions == [42, 2]
    np.testing.assert_array_equal(logits(edited)[1:], logits(prefix))
    branches = g.generate(prefix=prefix.rows([0] * 4), max_tokens=5, seed=3)
    assert len({tuple(branch.tokens) for branch in branches}) > 1
    assert branches[0].prompt_tokens == 42


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: g.generate([""]), "the prompt is empty"),
        (lambda g: g.generate([[]]), "the prompt is empty"),
        (lambda g: g.generate([]), "at least one prompt"),
        (lambda g: g.generate([[256]]), "token 256; the vocabulary is 0 to 255"),
        (lambda g: g.generate([[-1]]), "token -1"),
        (lambda g: g.generate([[0.5]]), "list of integers"),
        (lambda g: g.generate([b"\xff\xfea"]), "not UTF-8: invalid start byte at byte 0"),
        (lambda g: g.generate(["a\ud800"]), "half a surrogate pair"),
        (lambda g: g.generate(["a"], max_tokens=0), "max_tokens is 0"),
        (lambda g: g.generate(["a"], max_tokens=True), "max_tokens is True"),
        (lambda g: g.generate(["a"], stop=""), "stop is"),
        (lambda g: g.generate(["a"], seed=[1, 2]), "seed has 2 entries for 1 rows"),
        (lambda g: g.generate("a"), "must be a list"),
        (lambda g: g.generate(), "nothing to continue"),
        (lambda g: g.generate(prefix=g.read(["a"]).rows([])), "no rows are named"),
        (lambda g: g.read(["a", "b"], g.read(["a"])), "2 prompts and the prefix has 1 rows"),
        (lambda g: g.generate(["a"], prefix=g.read(["a", "b"])), "1 prompts and the prefix has 2 rows"),
        (lambda g: Generator(model()).generate(["text"]), "has no tokenizer"),
        (lambda g: hola_jax.generate(g, "a", tokenizer=Bytes()), "has its tokenizer already"),
        (lambda g: Generator(model(), pieces=(8, 16)), "the longest first"),
        (
            lambda g: Generator(LanguageModel(small("hola")), Bytes()),
            "256 tokens, more than the model's vocabulary of 31",
        ),
        (lambda g: Sampling(sampler="greddy"), "did you mean 'greedy'"),
        (lambda g: Sampling(top_p=0), "top_p is 0; it must be a number above 0 and at most 1"),
        (lambda g: Sampling(temperature=float("nan")), "temperature is nan"),
        (lambda g: Sampling(top_k=-1), "top_k is -1"),
    ],
)
def test_bad_input_is_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(generator())


def test_a_memory_of_another_model_is_not_joined() -> None:
    prefix = generator().read(["ab"])
    other = dataclasses.replace(
        prefix, memory=dataclasses.replace(prefix.memory, state={"another": prefix.memory.logits})
    )
    with pytest.raises(ValueError, match="another model"):
        prefix.insert(0, other)


def test_a_rest_is_read_by_one_long_piece_where_short_ones_cost_more():
    """HOLA goes over its running block, of 256 tokens here, for each piece."""
    memory = MemoryConfig(window=4, block=256)
    hola = Generator(LanguageModel(small("hola", memory=memory)), pieces=(1024, 256, 32))
    assert [hola.next_piece(n) for n in (1, 32, 33, 256, 257, 512, 513, 1023, 5000)] == [32] * 2 + [256] * 4 + [
        1024
    ] * 3
    without = Generator(LanguageModel(small("gated_deltanet")), pieces=(1024, 256, 32))
    assert [without.next_piece(n) for n in (1, 32, 33, 96, 97, 256, 257, 768, 769)] == [32] * 4 + [256] * 4 + [1024]
    rows = [np.arange(n) % 31 for n in (5, 70, 20, 16)]
    cut = [count[:4].tolist() for _, count in Generator(LanguageModel(small("hola")), pieces=(64, 16))._pieces(rows, 4)]
    assert np.sum(cut, axis=0).tolist() == [5, 70, 20, 16]
    for row, tokens in enumerate(rows):  # each as it is alone
        alone = [count[0] for _, count in Generator(LanguageModel(small("hola")), pieces=(64, 16))._pieces([tokens], 1)]
        assert [count[row] for count in cut if count[row]] == alone
