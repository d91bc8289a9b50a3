"""JSON lines: every text comes out once, and every line without one is reported by its number."""

import gzip
import json

import pytest

from train.data import jsonl

zstandard = pytest.importorskip("zstandard")

TEXTS = [f"text {i} " * i for i in range(200)]
PLAIN = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def packed(data, name):
    half = len(data) // 2  # two frames: files that were concatenated are legal
    if name.endswith(".zst"):
        return b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))
    return gzip.compress(data[:half]) + gzip.compress(data[half:]) if name.endswith(".gz") else data


def read(data, name="a.jsonl", step=1000):
    return list(jsonl.documents((data[i : i + step] for i in range(0, len(data), step)), name, "text"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("step", [7, 100, 10**6])
def test_every_text_comes_out_once(name, step):
    found = read(packed(PLAIN, name), name, step)
    assert [line.text for line in found] == TEXTS and [line.number for line in found] == list(range(1, 201))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"txt": "a"}', "no 'text'"),
        (b'{"text": 3}', "'text' is no string"),
        (b'{"text": null}', "'text' is no string"),
        (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10"),
        (b'{"text": "\\ud800"}', "'text' is no text"),
        (b"[" * 100000, "not JSON"),
    ],
)
def test_a_malformed_line_is_reported_and_the_rest_read(line, reason):
    found = read(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}')
    assert [each.text for each in found] == ["a", None, "b"]
    assert found[1].number == 3 and found[1].reason.startswith(reason) and found[2].number == 4


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_stream_that_ends_early_or_is_damaged_is_reported(name):
    whole = packed(PLAIN, name)
    damaged = bytearray(whole)
    damaged[-300:-200] = bytes(100)
    for data, reason in [(whole[:-200], "ends early"), (bytes(damaged), "damaged")]:
        *read_before, last = read(data, name, step=64)
        assert [line.text for line in read_before] == TEXTS[: len(read_before)] and len(read_before) > 50
        assert last.text is None and reason in last.reason and last.number == len(read_before) + 1
