"""Data that the tests make themselves, prepared once."""

import pytest

from tests.train.data.made import RECORD, made_texts, write_jsonl


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Three training files in two chunks and one for validation."""
    pytest.importorskip("zstandard")
    root = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        write_jsonl(root / f"train/chunk{number // 2 + 1}/example_{number}.jsonl.zst", made_texts(number, 150, 120))
    write_jsonl(root / "validation/example_holdout_0.jsonl.zst", made_texts(9, 20, 200))
    return root


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory):
    """The corpus, prepared with bytes."""
    from train.data.prepare import Prepare

    pytest.importorskip("apache_beam")
    out = tmp_path_factory.mktemp("prepared") / "data"
    given = dict(tokenizer="bytes", record_tokens=RECORD, workers=1)
    Prepare(inputs=(f"{corpus}/train",), held_out=(f"{corpus}/validation",), out=str(out), **given).run()
    return out
