"""The adapter to the lm-eval package: its three requests, its tasks over local files, and its wikitext beside ours."""

import json
import math

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="the lm-eval package is not installed; `make test-torch` installs it")

from lm_eval.tasks.wikitext import preprocess_wikitext  # noqa: E402

from hola_jax.evals import ModelScorer, perplexity, prepare  # noqa: E402
from hola_jax.evals.harness import HarnessModel  # noqa: E402
from tests.evals.small import BYTES, Told, model, setting  # noqa: E402

TEXT = "".join(
    f' = Title {n} = \n \n It was , said he , day {n} of " the year " ( 1 @,@ {n:03} ) . \n = = Part = = \n \n'
    + f" They ' went ' on {n} @-@ fold : up ; down . \n" * (n + 1)
    for n in range(5)
)


def evaluated(adapter, folder, **task):
    """The scores of a task that is defined here."""
    from lm_eval.tasks import TaskManager

    name = task["task"]
    found = lm_eval.simple_evaluate(
        model=adapter, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    return found["results"][name]


def local(folder, name, lines, **task):
    """A task over a JSON lines file."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    return {"task": name, **data, "num_fewshot": 0, **task}


@pytest.fixture(autouse=True)
def without_network(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def test_wikitext_is_ours_to_a_ten_thousandth(tmp_path):
    file = tmp_path / "wiki.raw"
    file.write_text(TEXT)
    scorer = ModelScorer(model(layers=1), piece=64, batch_tokens=256)
    ours = prepare([f"wikitext={file}"], setting(window=64))[0].measure(scorer, lambda rows: None).metrics
    task = local(
        tmp_path,
        "wikitext_here",
        [{"page": page} for page in perplexity.pages(TEXT)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target=preprocess_wikitext.wikitext_detokenizer,
        process_results=preprocess_wikitext.process_results,
        metric_list=[{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )
    theirs = evaluated(HarnessModel(scorer, BYTES, window=64), tmp_path, **task)
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert theirs[f"{name},none"] == pytest.approx(ours[name], rel=1e-4)


def test_our_windows_are_theirs():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for count in (1, 5, 8, 9, 16, 21):
        tokens = list(range(count))
        pairs = map(make_disjoint_window, get_rolling_token_windows(tokens, 99, 8, 1))
        ours = perplexity.windows(np.arange(count), 99, 8)
        for (context, rest), row, counted in zip(pairs, *ours, strict=True):
            assert [*context, *rest] == row.tolist() and len(rest) == counted


def test_the_running_text_is_theirs():
    for page in perplexity.pages(TEXT):
        assert perplexity.detokenised(page) == preprocess_wikitext.wikitext_detokenizer({"page": page})


def test_multiple_choice_goes_to_the_likelier(tmp_path):
    lines = [
        {"q": "sky", "choices": ["blue", "green"], "right": 0},
        {"q": "grass", "choices": ["red", "green"], "right": 0},
    ]

    def likely(row):
        return np.full(len(row) - 1, -0.1 if BYTES.decode(row.tolist()).endswith(("blue", "green")) else -4.0)

    task = local(
        tmp_path,
        "choices_here",
        lines,
        output_type="multiple_choice",
        doc_to_text="Question: {{q}}\nAnswer:",
        doc_to_choice="{{choices}}",
        doc_to_target="right",
        metric_list=[{"metric": "acc"}],
    )
    adapter = HarnessModel(Told(likely=likely), BYTES, window=64)
    assert (
        evaluated(adapter, tmp_path, **task)["acc,none"]
        == 0.5  # blue, the shorter of two likely ones; and green, which is wrong
    )  # "green" and "blue" tie where both are choices: blue is shorter


def test_text_is_generated_until_a_stop(tmp_path):
    asked = []

    def answer(prompt):
        asked.append(prompt)
        return " forty-two\nand more"

    task = local(
        tmp_path,
        "generated_here",
        [{"q": "six by seven", "a": "forty-two"}, {"q": "five", "a": "five"}],
        output_type="generate_until",
        doc_to_text="Q: {{q}}\nA:",
        doc_to_target="{{a}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 20, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[{"name": "none", "filter": [{"function": "remove_whitespace"}]}],
    )
    adapter = HarnessModel(Told(answer), BYTES, window=64)
    assert evaluated(adapter, tmp_path, **task)["exact_match,none"] == 0.5
    assert sorted(asked) == ["Q: five\nA:", "Q: six by seven\nA:"]


class Asked:
    def __init__(self, *args):
        self.args = args


def test_the_requests_one_by_one():
    adapter = HarnessModel(
        Told(lambda prompt: "ab##cd", lambda row: -np.arange(1.0, len(row))), BYTES, window=8, prefix=1
    )
    options = {"until": ["##"], "max_gen_toks": 6}
    assert adapter.generate_until([Asked("x", options), Asked("y", {"until": "d"})], True) == ["ab", "ab##c"]
    found = adapter.loglikelihood([Asked("abc", "de"), Asked("", "xy")], True)
    assert found == [(-(3.0 + 4.0), False), (-(1.0 + 2.0), False)]
    assert adapter.loglikelihood_rolling([Asked("abc"), Asked("")], True) == [-6.0, 0]
    with pytest.raises(NotImplementedError, match="greedily"):
        adapter.generate_until([Asked("x", {"do_sample": True, "temperature": 0.7})], True)


def test_the_model_answers_as_the_scorer_does():
    scorer = ModelScorer(model(layers=1), piece=32)
    adapter = HarnessModel(scorer, BYTES, window=32)
    (found,) = adapter.loglikelihood([Asked("abc", " de")], True)
    scored = scorer.loglikelihood([np.frombuffer(b"abc de", np.uint8)])[0]
    assert math.isclose(found[0], scored.logprob[-3:].sum(), rel_tol=1e-6)
    with pytest.raises(ValueError, match="window is 0"):
        HarnessModel(scorer, BYTES, window=0)
