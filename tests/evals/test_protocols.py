"""The exact strings of each protocol, their lengths in tokens, their scores, and that a seed decides them."""

import math
import re
import uuid
from random import Random

import numpy as np
import pytest

from hola_jax.evals import haystack, perplexity, probes, ruler, words
from hola_jax.evals.haystack import NOISE, Essay
from hola_jax.evals.tasks import prepare
from tests.evals.small import BYTES, WORDS, Told, setting


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    monkeypatch.setattr(words, "word_lists", lambda: WORDS)
    monkeypatch.setattr("hola_jax.evals.tasks.word_lists", lambda: WORDS)


@pytest.fixture
def essay(tmp_path):
    path = tmp_path / "essay.txt"
    path.write_text(" ".join(f'It was day {n} of "the year." We went on.' for n in range(400)))
    return Essay.read(str(path))


def made(task, essay=None, length=2048, samples=6, seed=42):
    return ruler.make(task, length=length, samples=samples, seed=seed, tokenizer=BYTES, essay=essay)


NUMBER, WORD = r"[1-9]\d{6}", "[a-z]+-[a-z]+"
ONE = re.compile(
    rf"A special magic number is hidden within the following text\. Make sure to memorize it\. I will quiz you about the "
    rf"number afterwards\.\n(?P<context>.*)\nWhat is the special magic number for (?P<key>{WORD}) mentioned in the provided "
    rf"text\? The special magic number for (?P=key) mentioned in the provided text is",
    re.DOTALL,
)


def test_one_needle_in_noise_to_the_letter():
    for sample in made("s_niah_1"):
        found = ONE.fullmatch(sample.prompt)
        needle = f"One of the special magic numbers for {found['key']} is: {sample.references[0]}."
        lines = found["context"].split("\n")
        assert set(lines) == {NOISE, needle} and lines.count(needle) == 1
        assert re.fullmatch(NUMBER, sample.references[0])
        assert sample.depths == (found["context"].index(needle) / len(found["context"]),)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_prompt_and_answer_fill_the_length_and_no_more(task, essay):
    unit = 110  # bytes of a line of any haystack
    for length in (2048, 4096):
        for sample in made(task, essay, length, samples=4):
            total = len(sample.prompt.encode()) + ruler.generated(task)
            assert length - 3 * unit < total <= length, task
            assert all(reference in sample.prompt for reference in sample.references)
            assert all(0 <= depth <= 1 for depth in sample.depths)


def test_the_length_is_in_tokens_of_the_tokenizer_at_hand():
    class Pairs:
        name, hash, vocab_size, eos = "pairs", "of bytes", 2**16, 0

        def encode(self, texts):
            return [np.zeros((len(text.encode()) + 1) // 2, np.int32) for text in texts]

    sample = ruler.make("s_niah_1", length=1024, samples=1, seed=1, tokenizer=Pairs())[0]
    assert 2 * (1024 - 128 - 60) < len(sample.prompt.encode()) <= 2 * (1024 - 128)


def test_several_keys_values_and_queries(essay):
    several, query = made("mv_niah", essay)[0], made("mq_niah", essay)[0]
    assert several.prompt.startswith("Some special magic numbers are hidden") and several.prompt.endswith("text are")
    key = re.search(f"numbers for ({WORD}) mentioned", several.prompt)[1]
    assert len(re.findall(f"One of the special magic numbers for {key} is: {NUMBER}[.]", several.prompt)) == 4
    assert len(set(several.references)) == 4
    asked = re.search(
        "What are all the special magic numbers for (.*) mentioned in the provided text[?]", query.prompt
    )[1]
    assert re.fullmatch(f"{WORD}, {WORD}, {WORD}, and {WORD}", asked)
    for key, value in zip(re.findall(WORD, asked), query.references, strict=True):
        assert f"One of the special magic numbers for {key} is: {value}." in query.prompt


def test_needles_as_haystack_and_uuids(essay):
    for sample in made("mk_niah_3", length=4096):
        lines = sample.prompt.split("\n")[1:-1]
        found = [re.fullmatch(r"One of the special magic uuids for (\S+) is: (\S+)\.", line) for line in lines]
        assert len(found) > 10 and all(found)
        assert all(uuid.UUID(text).version == 4 for line in found for text in line.groups())
        assert sample.prompt.endswith(
            f"The special magic uuid for {asked(sample, found)} mentioned in the provided text is"
        )
    lines = made("mk_niah_1", essay)[0].prompt
    assert len(set(re.findall(f"One of the special magic numbers for ({WORD}) is", lines))) == 4


def asked(sample, found):
    return next(line[1] for line in found if line[2] == sample.references[0])


def test_the_essay_stays_whole_around_its_needles(essay):
    for sample in made("s_niah_2", essay):
        context = ONE.fullmatch(sample.prompt)["context"]
        text = re.sub(rf"One of the special magic numbers for {WORD} is: {NUMBER}\.\s?", "", context).strip()
        assert " ".join(essay.words).startswith(text)
    sentences = essay.sentences(30)
    assert sentences[:3] == ('It was day 0 of "the year."', "We went on.", 'It was day 1 of "the year."')
    placed = haystack.into_sentences(sentences[:4], ["N0.", "N1."], [0, 50])
    assert placed == 'N0. It was day 0 of "the year." We went on. N1. It was day 1 of "the year." We went on.'


def test_tracing_follows_a_chain_after_a_worked_example():
    sample = made("vt")[0]
    example, question = sample.prompt.split("\n\nMemorize", 1)
    names, value = sample.references, re.search(r"assigned the value (\d{5}) in", question)[1]
    assert len(names) == len(set(names)) == 5 and all(re.fullmatch("[A-Z]{5}", name) for name in names)
    lines = [line for line in question.split("\n") if line.startswith("VAR")]
    assert lines == [f"VAR {names[0]} = {value}"] + [f"VAR {names[n]} = VAR {names[n - 1]} " for n in range(1, 5)]
    assert sample.prompt.endswith(
        f" Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the value "
        f"{value}, they are: "
    )
    assert re.search(r"they are: [A-Z]{3}( [A-Z]{3}){4}$", example)
    assert list(sample.depths) == sorted(sample.depths)


@pytest.mark.parametrize("task", ["s_niah_2", "vt"])
def test_a_seed_decides_the_samples_and_more_of_them_begin_alike(task, essay):
    assert made(task, essay, samples=3) == made(task, essay, samples=6)[:3]
    assert made(task, essay, samples=3) != made(task, essay, samples=3, seed=7)


def test_depths_spread_over_the_context():
    depths = [sample.depths[0] for sample in made("s_niah_1", samples=60)]
    assert np.histogram(depths, 4, (0, 1))[0].min() >= 5


def test_containment_whatever_the_case_up_to_the_end_of_the_document(essay):
    cell = prepare(["ruler/mq_niah@2k"], setting(haystack=essay.name))[0]
    answers = {sample.prompt: sample.references for sample in made("mq_niah", essay, samples=3)}
    two_of_four = Told(lambda prompt: f" {answers[prompt][0]} and {answers[prompt][3]}")
    measured = cell.measure(two_of_four, lambda rows: None)
    assert measured.metrics == {"accuracy": 0.5} and len(measured.depths) == 12
    assert sum(score for _, score in measured.depths) == 6
    cell = prepare(["ruler/vt@2k"], setting())[0]
    answers = {sample.prompt: sample.references for sample in made("vt", samples=3)}
    lower = Told(lambda prompt: " ".join(answers[prompt]).lower())
    assert cell.measure(lower, lambda rows: None).metrics == {"accuracy": 1.0}  # 29 characters of the 30


def test_the_passkey_to_the_letter():
    samples = probes.passkey(length=1024, samples=8, seed=3, tokenizer=BYTES)
    for sample in samples:
        first, before, told, after, last = sample.prompt.split("\n")
        key = sample.references[0]
        assert first.startswith("There is an important info hidden inside a lot of irrelevant text.")
        assert told == f"The pass key is {key}. Remember it. {key} is the pass key."
        assert last == "What is the pass key? The pass key is" and 1 <= int(key) <= 50000
        assert set(f"{before} {after}".replace(NOISE, "").strip()) <= {" "}
        assert 1024 - 10 - len(NOISE) - 8 <= len(sample.prompt) <= 1024 - 10
    answers = {sample.prompt: sample.references[0] for sample in samples}
    cell = prepare(["passkey@1k"], setting(samples=8, seed=3))[0]
    assert cell.measure(Told(lambda prompt: f" {answers[prompt]}. Re"), lambda n: None).metrics["accuracy"] == 1
    assert cell.measure(Told(lambda prompt: f" 0{answers[prompt]}"), lambda n: None).metrics["accuracy"] == 0


def test_the_far_needle_lies_at_a_tenth():
    for sample in probes.told("far_needle", length=4096, samples=5, seed=0, tokenizer=BYTES):
        assert ONE.fullmatch(sample.prompt) and sample.depths[0] == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("facts", probes.FACTS)
def test_recall_asks_one_of_its_facts(facts):
    for sample in probes.told(f"recall/{facts}", length=2048, samples=3, seed=0, tokenizer=BYTES):
        found = re.findall(rf"numbers for ({WORD}) is: ({NUMBER})\.", sample.prompt)
        assert len(found) == len(dict(found)) == facts
        assert (
            dict(found)[re.search(f"What is the special magic number for ({WORD})", sample.prompt)[1]]
            in sample.references
        )


def test_the_overwrite_probe_wants_the_latest():
    for sample in probes.told("overwrite", length=2048, samples=5, seed=0, tokenizer=BYTES):
        key = re.search(f"What is the latest special magic number for ({WORD})", sample.prompt)[1]
        written = re.findall(rf"The special magic number for {key} is now: ({NUMBER})\.", sample.prompt)
        assert written == [sample.stale, sample.references[0]]


def test_given_answers_are_scored_by_token_and_whole():
    cell = prepare(["recall/2@1k"], setting(samples=2))[0]
    samples = probes.told("recall/2", length=1024, samples=2, seed=42, tokenizer=BYTES)
    right = {s.prompt + " " + s.references[0]: n for n, s in enumerate(samples)}

    def likely(row):  # the first answer wholly, of the second half of the 8 bytes
        logprob = np.full(len(row) - 1, -5.0)
        logprob[-8 if right[BYTES.decode(row.tolist())] == 0 else -4 :] = -0.5
        return logprob

    assert cell.measure(Told(likely=likely), lambda n: None).metrics == {"accuracy": 0.75, "exact": 0.5}


def test_a_stale_answer_that_is_likelier_is_reported():
    cell = prepare(["overwrite@1k"], setting(samples=3))[0]
    samples = probes.told("overwrite", length=1024, samples=3, seed=42, tokenizer=BYTES)
    stale = {s.prompt + " " + s.stale for s in samples}
    likely = lambda row: np.full(len(row) - 1, -0.5 if BYTES.decode(row.tolist()) in stale else -2.0)  # noqa: E731
    assert cell.measure(Told(likely=likely), lambda n: None).metrics == {
        "accuracy": 0.0,
        "exact": 0.0,
        "prefers_stale": 1.0,
    }


def test_mqar_asks_each_key_once_behind_its_pairs():
    found = probes.mqar(length=128, pairs=8, samples=20, seed=0)
    gaps = []
    for tokens, asked, depths in zip(*found, strict=True):
        keys, values = tokens[:16:2], tokens[1:16:2]
        assert set(tokens[asked]) == set(keys) and asked.sum() == 8 and not asked[:16].any()
        assert keys.min() >= 1 and keys.max() <= 4095 and values.min() >= 4096 and values.max() <= 8191
        memory = dict(zip(keys, values, strict=True))
        for place in np.flatnonzero(asked):
            assert tokens[place + 1] == memory[tokens[place]]
            gaps.append((place - 16) // 2)
            assert depths[place] == 2 * list(keys).index(tokens[place]) / 128
    assert np.mean(np.array(gaps) < 14) > 0.5  # a quarter of the places: near ones are likelier
    cell = prepare(["mqar/8@128"], setting(vocab_size=8192, samples=4))[0]
    assert cell.rows == 4 and cell.name == "mqar/8@128"

    class Wide(Told):
        vocab_size = 8192

    likely = lambda row: np.where(row[1:] >= 4096, -0.5, -5)  # noqa: E731
    assert cell.measure(Wide(likely=likely), lambda n: None).metrics == {"accuracy": 1.0}


PAGE = (
    " = Some Title = \n \n It cost $ 1 @,@ 500 ( about @-@ face ) ; he said \" yes \" . \n = = Part = = \n \n An ' end ' , "
    "at 3 @.@ 5 ! \n"
)


def test_pages_words_and_running_text():
    text = f" \n{PAGE} = Other = \n \n More . \n"
    assert perplexity.pages(text) == [PAGE, " = Other = \n \n More . \n"]
    assert perplexity.detokenised(PAGE) == (
        " = Some Title =\n\nIt cost $ 1,500 (about-face); he said \"yes\".\n== Part ==\n\nAn 'end', at 3.5!\n"
    )
    assert perplexity.word_count(" = A = \n") == 5  # what stands before the first blank and behind the last counts
    assert perplexity.pages("no titles here") == ["no titles here"]


def test_windows_predict_each_token_once():
    tokens = np.arange(10)
    rows, counted = perplexity.windows(tokens, 99, 4)
    assert [row.tolist() for row in rows] == [[99, 0, 1, 2, 3], [3, 4, 5, 6, 7], [5, 6, 7, 8, 9]]
    assert counted == [4, 4, 2]  # the last row reaches back to be as long as the others
    rows, counted = perplexity.windows(tokens[:3], 99, 4)
    assert [row.tolist() for row in rows] == [[99, 0, 1, 2]] and counted == [3]


def test_perplexity_counts_words_of_the_page_and_tokens_of_the_text(tmp_path):
    file = tmp_path / "wiki.raw"
    file.write_text(PAGE)
    cell = prepare([f"wikitext={file}"], setting(window=16))[0]
    measured = cell.measure(Told(likely=lambda row: np.full(len(row) - 1, -math.log(2))), lambda n: None).metrics
    tokens, words_, size = len(perplexity.detokenised(PAGE).encode()), perplexity.word_count(PAGE), len(PAGE.encode())
    assert measured["token_perplexity"] == pytest.approx(2)
    assert measured["word_perplexity"] == pytest.approx(2 ** (tokens / words_))
    assert measured["bits_per_byte"] == pytest.approx(tokens / size)


def test_lambada_wants_all_of_the_last_word(tmp_path):
    file = tmp_path / "lambada.jsonl"
    file.write_text('{"text": "she opened the door"}\nhe closed the gate\n')
    assert perplexity.passages(str(file)) == [("she opened the", " door"), ("he closed the", " gate")]
    cell = prepare([f"lambada={file}"], setting())[0]

    def likely(row):
        logprob = np.full(len(row) - 1, -9.0)
        logprob[-5 if row[-1] == ord("r") else -4 :] = -0.5
        return logprob

    measured = cell.measure(Told(likely=likely), lambda n: None).metrics
    assert measured == {"accuracy": 0.5, "perplexity": pytest.approx(math.exp((2.5 + 9 + 2) / 2))}


def test_the_words_are_those_of_wonderwords(monkeypatch):
    pytest.importorskip("wonderwords", reason="wonderwords is not installed: pip install 'hola-jax[evals]'")
    monkeypatch.undo()
    adjectives, nouns = words.word_lists()
    assert len(adjectives) > 800 and len(nouns) > 6000
    assert re.fullmatch(r"[\w' .]+-[\w' .-]+", words.draw("words", Random(0)))
