"""The standard library's text: split by file, in the tokenizer that is asked for."""

import numpy as np
import pytest

from train.data import folder, loader, tokenizers
from train.data.config import LibraryText
from train.sources import library_files


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Forty files and a test, as the standard library's folder."""
    root = tmp_path / "lib"
    (root / "test").mkdir(parents=True)
    for number in range(40):
        (root / f"m{number}.py").write_text(f"value_{number} = {number}\n" * 30)
    (root / "test" / "t.py").write_text("left out\n")
    monkeypatch.setattr(folder.sysconfig, "get_path", lambda name: str(root))
    monkeypatch.setattr("train.sources.sysconfig.get_path", lambda name: str(root))
    return root


def test_files_fall_to_one_split_each_and_tests_to_none(library):
    train, held_out = (folder.texts(LibraryText(), split) for split in ("train", "held_out"))
    assert len(train) + len(held_out) == 40 and 0 < len(held_out) < 12
    assert not set(train) & set(held_out) and "test/t.py" not in train | held_out
    assert all(text.startswith("value_") for text in (train | held_out).values())


def test_its_tokens_are_those_of_the_tokenizer_asked_for(library, tmp_path):
    path = tmp_path / "own.json"
    path.write_bytes(tokenizers.train_bpe(folder.texts(LibraryText(), "train").values(), 270))
    source, own = LibraryText(tokenizer=str(path)), tokenizers.load(str(path))
    assert loader.identity(source) == {"tokenizer": "own.json", "hash": own.hash, "vocab_size": 270}
    documents, _ = folder.documents(source, "held_out")
    texts = list(folder.texts(source, "held_out").values())
    assert [own.decode(document) for document in documents] == texts
    rows = loader.open_source(source, split="train", vocab_size=270, row=16, seed=0)
    assert np.max(rows[0]["tokens"]) < 270 and len(documents[0]) < len(texts[0].encode())


def test_a_library_without_its_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \.py files: this Python came without the source"):
        library_files(tmp_path)
