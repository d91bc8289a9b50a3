"""Names, lengths and files of tasks, what is refused before there is a model, the cache of samples, and the report."""

import json

import numpy as np
import pytest

from hola_jax.evals import parse, prepare, report, samples, tasks, words
from hola_jax.evals.samples import Sample
from hola_jax.evals.tasks import Cell, Measured, Wanted
from tests.evals.small import BYTES, WORDS, setting


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    monkeypatch.setattr(words, "word_lists", lambda: WORDS)
    monkeypatch.setattr(tasks, "word_lists", lambda: WORDS)


def test_a_task_is_read_with_its_lengths():
    assert parse("ruler/s_niah_1@2k,4096,8K") == [Wanted("ruler/s_niah_1", (2048, 4096, 8192))]
    assert parse("passkey") == [Wanted("passkey", (2048,))]
    assert parse("far_needle") == [Wanted("far_needle", (4096,))]
    assert [each.task for each in parse("ruler@2k")] == list(tasks.RULER) and len(tasks.RULER) == 9
    assert [each.task for each in parse("recall")] == [f"recall/{n}" for n in (1, 2, 4, 8, 16)]
    assert parse("mqar/16@256") == [Wanted("mqar", (256,), pairs=16)]
    assert parse("wikitext=a/b@c.raw") == [Wanted("wikitext", file="a/b@c.raw")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ruler/s_niha_1@2k", "there is no task 'ruler/s_niha_1'; did you mean 'ruler/s_niah_1'"),
        ("s_niah_2", "did you mean 'ruler/s_niah_2'"),
        ("passkey@2q", "'2q' in 'passkey@2q' is no length; write tokens, such as 512, 2k"),
        ("passkey@0", "'0' in 'passkey@0' is no length"),
        ("wikitext", "write wikitext=FILE"),
        ("wikitext@2k=x", "write wikitext=FILE"),
        ("passkey=x", "write passkey@LENGTH"),
        ("mqar/none@64", "write mqar/PAIRS@LENGTH"),
    ],
)
def test_an_unknown_task_or_length_is_refused_by_name(text, told):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert told in str(error.value)


class Upper:
    """A tokenizer of capital letters alone."""

    name, hash, vocab_size, eos = "capitals", "capitals", 27, 26

    def encode(self, texts):
        return [np.array([ord(c) - 65 for c in text if "A" <= c <= "Z"], np.int32) for text in texts]

    def decode(self, tokens):
        return "".join(chr(65 + token) for token in tokens)


@pytest.mark.parametrize(
    ("task", "fields", "told"),
    [
        ("wikitext=missing.raw", {}, "there is no file missing.raw, named as wikitext"),
        ("ruler/s_niah_2@2k", {}, "ruler/s_niah_2 hides its needles in a text; name one with --haystack FILE"),
        ("ruler/s_niah_2@2k", {"haystack": "missing.txt"}, "there is no file missing.txt, named as the haystack"),
        ("passkey@100", {}, "a prompt of passkey has 247 tokens of bytes without any haystack, and 90 are left"),
        (
            "passkey@2k",
            {"tokenizer": Upper()},
            "the tokenizer capitals has no tokens for '\\n ,-.0123456789:?abc' and 23 more, which passkey needs",
        ),
        ("passkey@8k", {"longest": 4096}, "passkey asks for 8192 tokens, and the model holds 4096"),
        ("passkey@2k", {"vocab_size": 100}, "the tokenizer bytes has 256 tokens, and the model's vocabulary 100"),
        ("mqar@64", {}, "mqar has 8192 tokens, and the model's vocabulary 256"),
        ("mqar/17@64", {"vocab_size": 8192}, "mqar asks 17 pairs in 64 tokens; at this length 1 to 16 are possible"),
        ("passkey@2k", {"samples": 0}, "samples is 0"),
        ("wikitext=missing.raw", {"window": 0}, "window is 0"),
    ],
)
def test_what_cannot_be_is_refused_before_there_is_a_model(task, fields, told):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        prepare([task], setting(**fields))
    assert told in str(error.value).replace("\n", "\\n")


def test_an_empty_or_short_text_is_refused(tmp_path):
    empty, short, broken = tmp_path / "empty", tmp_path / "short", tmp_path / "broken"
    empty.write_text(" \n")
    short.write_text("A short text. " * 20)
    broken.write_bytes(b"\xff\xfe")
    for name in ("wikitext", "lambada"):
        with pytest.raises(ValueError, match=f"empty, named as {name}, is empty"):
            prepare([f"{name}={empty}"], setting())
    with pytest.raises(ValueError, match="empty, named as the haystack, is empty"):
        prepare(["ruler/s_niah_2@2k"], setting(haystack=str(empty)))
    with pytest.raises(
        ValueError, match=r"short has 60 words, \d+ tokens in a prompt of ruler/s_niah_2, fewer than the 1920"
    ):
        prepare(["ruler/s_niah_2@2k"], setting(haystack=str(short)))
    with pytest.raises(ValueError, match="broken, named as wikitext, is not UTF-8"):
        prepare([f"wikitext={broken}"], setting())


def test_wonderwords_is_asked_for_by_name(monkeypatch):
    monkeypatch.undo()

    def gone(name):
        raise ModuleNotFoundError("No module named 'wonderwords'", name="wonderwords")

    monkeypatch.setattr(words.resources, "files", gone)
    words.word_lists.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'hola-jax\[evals\]'"):
        prepare(["ruler/s_niah_1@2k"], setting())
    assert prepare(["passkey@1k"], setting(samples=1))  # which needs no words


def test_samples_are_made_once_for_a_setting(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return [Sample("prompt\nof two lines", ("a", "b"), (0.25, 1.0)), Sample("x", ("y",), (0.0,), stale="z")]

    given = {"task": "ruler/vt", "length": 2048}
    first = samples.stored(tmp_path, given, make)
    assert samples.stored(tmp_path, given, make) == first == make() and len(calls) == 2
    samples.stored(tmp_path, {**given, "length": 4096}, make)
    assert len(calls) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_of_samples_cut_short_is_made_again(tmp_path):
    make = lambda: [Sample("x", ("y",), (0.0,))] * 3  # noqa: E731
    samples.stored(tmp_path, {"task": "t"}, make)
    file = next(tmp_path.iterdir())
    for cut in (file.read_text()[:-15], "", "no json\n\n"):
        file.write_text(cut)
        assert samples.stored(tmp_path, {"task": "t"}, make) == make()


def test_tokenizer_seed_and_haystack_each_have_their_own_samples(tmp_path):
    for seed in (1, 2):
        prepare(["recall/1@1k"], setting(cache=tmp_path, seed=seed, samples=2))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 2
    prepare(["recall/1@1k"], setting(cache=tmp_path, seed=1, samples=2))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_depth_falls_into_fifths():
    found = report.by_depth(((0.0, 1.0), (0.19, 0.0), (0.2, 1.0), (0.99, 1.0), (1.0, 0.0)))
    assert [(part["score"], part["answers"]) for part in found] == [(0.5, 2), (1.0, 1), (None, 0), (None, 0), (0.5, 2)]
    assert found[1]["from"] == 0.2 and found[1]["to"] == 0.4


def test_the_tables_say_each_score_by_length_and_by_depth():
    records = []
    for length, score in ((2048, 1.0), (4096, 0.5)):
        cell = Cell("ruler/vt", length, 2, {"seed": 42}, lambda scorer, done: None)
        records.append(report.record(cell, Measured({"accuracy": score}, ((0.1, score),)), 1.5))
    records.append(
        report.record(Cell("wikitext", None, 2, {}, lambda s, d: None), Measured({"word_perplexity": 27.3219}), 2.0)
    )
    lines = report.table(records).split("\n")
    assert lines[0].split() == [
        "task",
        "length",
        "accuracy",
        "word_perplexity",
        "0-20%",
        "20-40%",
        "40-60%",
        "60-80%",
        "80-100%",
    ]
    assert lines[1].split() == ["ruler/vt", "2k", "1.000", "1.000"] and lines[3].split() == ["wikitext", "27.322"]
    assert [line.split() for line in report.by_length(records).split("\n")] == [
        ["accuracy", "2k", "4k"],
        ["ruler/vt", "1.000", "0.500"],
    ]
    assert json.loads(json.dumps(records))[0]["about"] == {"seed": 42}


def test_bytes_are_a_tokenizer_that_loses_nothing():
    tasks.check_characters(BYTES, "".join(map(chr, range(32, 0x250))), "this test")
