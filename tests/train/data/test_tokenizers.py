"""Tokenizers: text comes back, a long text is cut only where nothing changes, and a hash tells one from another."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import tokenizers

WORDS = [f"word{i} and  its\n\n neighbour, number {i};\tnaïve café 漢字 ▁ x▁ ▁y\u00a0 z" for i in range(400)]


@pytest.fixture(scope="module")
def trained():
    return tokenizers.Json(tokenizers.train_bpe(iter(WORDS), 400), "trained")


@pytest.fixture(scope="module")
def mistral():
    pytest.importorskip("mistral_common")
    return tokenizers.load("mistral-v1")


@pytest.fixture(params=["bytes", "trained", "mistral"])
def tokenizer(request):
    return tokenizers.load("bytes") if request.param == "bytes" else request.getfixturevalue(request.param)


def test_text_comes_back(tokenizer):
    texts = ["to be or not to be", " a  b\n c", "naïve 漢字 🙂", "x" * 5000, " ".join(WORDS)]
    for text, tokens in zip(texts, tokenizer.encode(texts), strict=True):
        assert tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size and tokenizer.eos not in tokens
        back = text.replace("▁", " ") if tokenizer.name == "mistral-v1" else text  # sentencepiece's own space
        assert tokenizer.decode([*tokens, tokenizer.eos]) == back


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "the", " ", "  ", "\n", "\t", "▁", "漢", "é", "'s", "1", "\x1c", "."]), max_size=60)
)
def test_a_cut_changes_no_token(trained, mistral, monkeypatch_piece, pieces):
    text = "".join(pieces)
    whole = trained.library.encode(text, add_special_tokens=False).ids, mistral.library.encode(text)
    cut = [tokenizer.encode([text])[0].tolist() for tokenizer in (trained, mistral)]
    assert cut == list(whole)


@pytest.fixture(scope="module")
def monkeypatch_piece():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "PIECE", 6)
        yield


def test_a_long_text_is_cut(trained):
    assert len(list(trained.cut(" ".join(WORDS)))) > 10


def test_training_is_repeatable_and_the_hash_is_of_the_file(trained, tmp_path):
    again = tokenizers.train_bpe(iter(WORDS), 400)
    assert again == trained.data
    (tmp_path / "t.json").write_bytes(again)
    assert tokenizers.load(str(tmp_path / "t.json")).hash == trained.hash != tokenizers.load("bytes").hash


def test_a_file_that_cuts_texts_short_is_not_obeyed(trained, tmp_path):
    config = json.loads(trained.data)
    config["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    found = tokenizers.Json(json.dumps(config).encode(), "short")
    assert len(found.encode([" ".join(WORDS)])[0]) > 1000


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
            "no token that ends a document",
        ),
        (None, "no tokenizers JSON"),
    ],
)
def test_a_json_that_cannot_serve_is_refused(trained, change, reason):
    data = b"{}" if change is None else json.dumps({**json.loads(trained.data), **change}).encode()
    with pytest.raises(ValueError, match=reason):
        tokenizers.Json(data, "bad.json")


def test_an_unknown_name_is_refused():
    with pytest.raises(FileNotFoundError, match="neither `bytes` nor `mistral-v1`"):
        tokenizers.load("nothing.json")


def test_bytes_end_a_document_with_what_utf8_never_uses():
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 97)]))
    assert np.max(tokenizers.load("bytes").encode([every])[0]) < tokenizers.Bytes.eos


@pytest.mark.parametrize("missing", ["mistral_common", "sentencepiece"])
def test_a_missing_package_is_said_with_what_to_install(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'hola-jax\[mistral\]'"):
        tokenizers.load("mistral-v1")
