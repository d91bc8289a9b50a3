"""Sources to batches: the same global order whoever reads it, and what is wrong with the data said at start."""

import itertools
import shutil
import sys

import numpy as np
import pytest

from tests.train.data.made import RECORD
from train.data.config import Facts, LibraryText, Mixture, Records, TextFolder
from train.data.loader import batches, identity, open_source


@pytest.fixture
def texts(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"file {number} says {number * 7919 % 31} " * 20)
    return TextFolder(str(tmp_path), held_out=0.3)


def opened(source, split="train", row=32, seed=0, vocab_size=256):
    return open_source(source, split=split, vocab_size=vocab_size, row=row, seed=seed)


def taken(rows, count, **given):
    found = batches(rows, **{"position": 0, "global_batch": 8, **given})
    return list(itertools.islice(found, count))


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_global_batches_do_not_depend_on_the_number_of_processes(texts, processes):
    rows = opened(texts)
    whole = taken(rows, 5)
    shares = [taken(rows, 5, process=p, processes=processes) for p in range(processes)]
    for number in range(5):
        for name in ("tokens", "segment_ids", "mask"):
            assert np.array_equal(np.concatenate([share[number][name] for share in shares]), whole[number][name])


@pytest.mark.parametrize("change", [{"threads": 0}, {"threads": 4, "prefetch": 1}, {"prefetch": 9}, {"workers": 2}])
def test_threads_processes_and_prefetch_change_nothing(texts, change):
    rows = opened(texts)
    for one, other in zip(taken(rows, 6), taken(rows, 6, **change), strict=True):
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_a_position_is_all_that_is_needed_to_go_on(texts):
    rows = opened(texts)
    after = taken(rows, 3, position=24)
    assert np.array_equal(np.stack([b["tokens"] for b in taken(rows, 6)[3:]]), np.stack([b["tokens"] for b in after]))
    far = taken(rows, 1, position=10**15)[0]["tokens"]
    assert far.shape == (8, 33) and np.array_equal(far[3], rows[10**15 + 3]["tokens"])


def test_held_out_rows_end_and_are_other_text(texts):
    train, held_out = opened(texts), opened(texts, "held_out")
    assert len(train) == sys.maxsize and 0 < len(held_out) < 1000
    said = {bytes(row["tokens"].astype(np.uint8)) for row in (train[i] for i in range(300))}
    assert not said & {bytes(held_out[i]["tokens"].astype(np.uint8)) for i in range(len(held_out))}
    assert len(taken(held_out, 10**6)) == len(held_out) // 8


def test_a_mixture_holds_its_weights_and_its_parts_stay_what_they_are(texts):
    mixture = Mixture(((3.0, texts), (1.0, Facts())))
    rows = opened(mixture, row=64, vocab_size=1000)
    kinds = [int(rows[i]["mask"].mean() < 0.5) for i in range(400)]
    assert sum(kinds) == 100 and max(map(len, "".join(map(str, kinds)).split("1"))) <= 4
    assert identity(mixture)["hash"] == identity(texts)["hash"]
    assert taken(rows, 2, position=10**9)[1]["mask"].shape == (8, 65)


def test_library_text_needs_nothing():
    text = b"".join(bytes(row["tokens"].astype(np.uint8)) for row in taken(opened(LibraryText(), row=128), 20))
    assert b"def " in text and b"import " in text
    assert len(opened(LibraryText(), "held_out", row=128)) > 100
    assert identity(LibraryText())["vocab_size"] == 256


def test_prepared_records_give_rows(prepared):
    rows = opened(Records(str(prepared)), row=100)
    one, other = taken(rows, 2), taken(opened(Records(str(prepared)), row=100, seed=1), 2)
    assert one[0]["tokens"].shape == (8, 101) and not np.array_equal(one[0]["tokens"], other[0]["tokens"])
    assert len(opened(Records(str(prepared)), "held_out", row=RECORD)) > 3
    for change in ({"workers": 2}, {"threads": 8}):
        assert np.array_equal(taken(rows, 2, **change)[1]["tokens"], one[1]["tokens"])


@pytest.fixture
def copy(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    return tmp_path / "copy"


def a_shard(folder):
    return sorted((folder / "train").glob("chunk1*"))[0]


def flip(path):
    data = bytearray(path.read_bytes())
    for place in range(5000, 100_000, 50):  # the end, which is read at start, stays whole
        data[place] ^= 1
    path.write_bytes(data)


FAULTS = {
    "flipped": (lambda f: flip(a_shard(f)), "is corrupt: its sha256 is not the manifest's"),
    "truncated": (lambda f: a_shard(f).write_bytes(a_shard(f).read_bytes()[:-100]), r"bytes, the manifest says"),
    "zeroed": (lambda f: a_shard(f).write_bytes(bytes(a_shard(f).stat().st_size)), "is corrupt"),
    "missing": (lambda f: a_shard(f).unlink(), "is missing"),
    "unlisted": (
        lambda f: shutil.copy(a_shard(f), f / "train/more.array_record"),
        "more.array_record is not in the mani",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
    "half a manifest": (
        lambda f: (f / "manifest.json").write_text('{"format": 1,'),
        "is no manifest of `hola prepare`",
    ),
    "another format": (
        lambda f: (f / "manifest.json").write_text('{"format": 9}'),
        "format 9, and this version reads 1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_with_a_fault_is_refused_at_start_and_the_fault_named(copy, fault):
    damage, reason = FAULTS[fault]
    damage(copy)
    with pytest.raises((ValueError, OSError), match=reason):
        opened(Records(str(copy)))


def test_what_only_checksums_tell_is_named_when_it_is_read(copy):
    flip(a_shard(copy))
    rows = opened(Records(str(copy), check="size"))
    with pytest.raises(OSError, match=rf"{a_shard(copy).name} cannot be read .*: Corrupted"):
        for index in range(10000):
            rows[index]


def test_another_tokenizer_is_refused(prepared, texts):
    with pytest.raises(ValueError, match="the data was made with bytes"):
        opened(Records(str(prepared), tokenizer="0" * 64))
    opened(Records(str(prepared), tokenizer="bytes"))


def test_a_vocabulary_larger_than_the_models_is_refused(prepared, texts):
    for source in (Records(str(prepared)), texts, LibraryText(), Mixture(((1, texts),))):
        with pytest.raises(ValueError, match=r"bytes has 256 tokens, more than the model's vocabulary of 255"):
            opened(source, vocab_size=255)


def test_a_folder_that_cannot_serve_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no files \*\*/\*\.txt"):
        opened(TextFolder(str(tmp_path)))
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 \(invalid start byte at byte 3\)"):
        opened(TextFolder(str(tmp_path), held_out=0.0))
    with pytest.raises(ValueError, match="falls to the held_out split"):
        opened(TextFolder(str(tmp_path), held_out=0.0), "held_out")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        opened(TextFolder(str(tmp_path / "a.txt")))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"position": -1}, "position is -1"),
        ({"global_batch": 6, "processes": 4}, "must be a multiple of the number of processes, 4"),
        ({"process": 2, "processes": 2}, "one of 0 to 1"),
    ],
)
def test_a_wrong_share_is_refused(texts, change, reason):
    with pytest.raises(ValueError, match=reason):
        taken(opened(texts), 1, **change)
