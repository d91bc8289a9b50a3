"""`hola prepare`: nothing lost, nothing that lies, and the same bytes however often it was interrupted."""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.data.made import KILL, RECORD, contents, ended, hola, made_texts, small_disk, write_jsonl
from train.data import shards
from train.data.config import Records
from train.data.loader import open_source
from train.data.prepare import Prepare

pytest.importorskip("apache_beam")
from apache_beam.io.localfilesystem import LocalFileSystem


def texts_of(root, split):
    """The documents of a split, read back from its shards."""
    stored = shards.StoredTokens(str(root), shards.read_manifest(str(root)), split)
    tokens, _ = stored.read(0, len(stored))
    ends = np.flatnonzero(tokens == 255)
    return [bytes(piece.astype(np.uint8)[:-1]).decode() for piece in np.split(tokens, ends + 1) if len(piece)]


def prepare(inputs, out, **options):
    Prepare(inputs=tuple(map(str, inputs)), out=str(out), **{"tokenizer": "bytes", "workers": 1, **options}).run()


def test_every_document_is_there_once_and_counted(prepared):
    manifest = shards.read_manifest(str(prepared))
    texts = [text for seed in range(3) for text in made_texts(seed, 150, 120) if text]
    train, held_out = manifest.splits["train"], manifest.splits["held_out"]
    assert train.documents == len(texts) and train.bytes == sum(map(len, texts))
    assert train.tokens == train.bytes + train.documents and train.records == -(-train.tokens // RECORD)
    assert held_out.documents == sum(bool(text) for text in made_texts(9, 20, 200))
    assert sum(each["empty"] for each in manifest.inputs) == 170 - held_out.documents + 300 - len(texts)
    assert manifest.inputs[0]["file"] == "chunk1/example_0.jsonl.zst"
    stored = shards.StoredTokens(str(prepared), manifest, "train")
    tokens, begins = stored.read(0, len(stored))
    assert (
        np.bincount(tokens, minlength=256)[:255].tolist()
        == np.bincount(np.frombuffer("".join(texts).encode(), np.uint8), minlength=256)[:255].tolist()
    )
    assert (tokens == 255).sum() == train.documents
    assert begins[0] and begins.sum() >= train.documents and begins[np.flatnonzero(tokens[:-1] == 255) + 1].all()


def test_reading_anywhere_is_reading_everything(prepared):
    stored = shards.StoredTokens(str(prepared), shards.read_manifest(str(prepared)), "train")
    tokens, begins = stored.read(0, len(stored))
    for start, stop in [(0, 1), (63, 65), (100, 1000), (len(stored) - 5, len(stored)), (64, 128)]:
        found = stored.read(start, stop)
        assert np.array_equal(found[0], tokens[start:stop]) and np.array_equal(found[1], begins[start:stop])


def test_nothing_is_done_twice(prepared, corpus, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*.array_record") if "rest" not in path.name}
    bytes_before = contents(prepared)
    prepare([corpus / "train"], prepared, held_out=(f"{corpus}/validation",), record_tokens=RECORD)
    assert "4 of 4 shards are done already" in capsys.readouterr().out
    assert contents(prepared) == bytes_before
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


def test_other_settings_in_the_same_folder_are_refused_by_name(prepared, corpus):
    with pytest.raises(ValueError, match="record_tokens was 64 and is 128"):
        prepare([corpus / "train"], prepared, held_out=(f"{corpus}/validation",), record_tokens=128)


def test_the_held_out_share_is_chosen_by_hash_and_the_rest_trains(corpus, tmp_path):
    prepare([corpus / "train"], tmp_path, held_out_fraction=0.3, record_tokens=RECORD)
    train, held_out = (set(texts_of(tmp_path, split)) for split in ("train", "held_out"))
    manifest = shards.read_manifest(str(tmp_path))
    assert 0.2 < manifest.splits["held_out"].documents / 450 < 0.4
    texts = {text for seed in range(3) for text in made_texts(seed, 150, 120) if text}
    assert len((train | held_out) & texts) > 300 and not train & held_out & texts


def test_more_inputs_are_added_to_those_that_are_done(corpus, tmp_path, capsys):
    shutil.copytree(corpus / "train", tmp_path / "in")
    prepare([tmp_path / "in"], tmp_path / "out", record_tokens=RECORD)
    write_jsonl(tmp_path / "in/chunk3/example_3.jsonl.zst", made_texts(3, 50, 100))
    prepare([tmp_path / "in"], tmp_path / "out", record_tokens=RECORD)
    assert "3 of 4 shards are done already" in capsys.readouterr().out
    prepare([tmp_path / "in"], tmp_path / "at once", record_tokens=RECORD)
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")


def test_malformed_lines_are_named_counted_and_passed_over(tmp_path, capsys):
    lines = [b'{"text": "good"}', b'{"text": 3}', b"{", b'{"text": "\xff"}', b'{"text": "fine"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", held_out_fraction=0.0)
    assert texts_of(tmp_path / "out", "train") == ["good", "fine"]
    found = json.loads((tmp_path / "out/manifest.json").read_text())
    assert [(each["file"], each["line"]) for each in found["malformed"]] == [("a.jsonl", n) for n in (2, 3, 4)]
    assert found["inputs"][0]["malformed"] == 3 and "malformed: a.jsonl, line 3: not JSON" in capsys.readouterr().out


def test_too_many_malformed_lines_stop_it_without_a_manifest(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{\n{\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: not JSON.*more than 1 lines are malformed"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", max_malformed=1)
    assert not list((tmp_path / "out").rglob("*.array_record")) and not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [(None, "holds no file that ends in .jsonl"), (b"", "no documents"), (b'{"text": ""}', "no documents")],
)
def test_empty_input_is_refused(tmp_path, data, reason):
    (tmp_path / "in").mkdir()
    if data is not None:
        (tmp_path / "in/a.jsonl").write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        prepare([tmp_path / "in"], tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


def big(tmp_path):
    for number in range(6):
        write_jsonl(tmp_path / f"in/{number}.jsonl.zst", made_texts(number, 200, 800))
    (tmp_path / "in/broken.jsonl").write_text("{}\n")
    return ["prepare", tmp_path / "in", "--train-tokenizer", 600, "--train-tokenizer-mb", 1, "--workers", 2, "--out"]


def test_killed_and_begun_again_it_makes_the_same_bytes(tmp_path):
    command = big(tmp_path)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert ended(hola(*command, whole))[0] == 0
    process = hola(*command, out)
    while len(list(out.glob("reports/*.json"))) < 2 and process.poll() is None:
        time.sleep(0.02)
    assert ended(process, KILL)[0] == -KILL
    assert not (out / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="did not finish; run it again"):
        open_source(Records(str(out)), split="train", vocab_size=1000, row=8, seed=0)
    status, said = ended(hola(*command, out))
    assert status == 0 and "are done already" in said
    assert contents(out) == contents(whole)
    assert "broken.jsonl, line 1: no 'text'" in said
    open_source(Records(str(out)), split="train", vocab_size=600, row=64, seed=0)


class Elsewhere(LocalFileSystem):
    """A file system behind a scheme, as gs:// is: elsewhere://a/b is the file a/b below `root`."""

    root = ""

    @classmethod
    def scheme(cls):
        return "elsewhere"

    def join(self, basepath, *paths):
        return "/".join([basepath.rstrip("/"), *paths])

    def _here(self, path):
        return path.replace("elsewhere:/", self.root)

    def has_dirs(self):
        return False

    def _list(self, dir_or_prefix):
        for found in super()._list(self._here(dir_or_prefix)):
            found.path = found.path.replace(self.root, "elsewhere:/")
            yield found

    def create(self, path, *given, **more):
        os.makedirs(os.path.dirname(self._here(path)), exist_ok=True)
        return super().create(self._here(path), *given, **more)

    def open(self, path, *given, **more):
        return super().open(self._here(path), *given, **more)

    def exists(self, path):
        return super().exists(self._here(path))

    def delete(self, paths):
        return super().delete([self._here(path) for path in paths])


def test_folders_behind_a_scheme_are_read_and_written_alike(corpus, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(Elsewhere, "root", str(tmp_path))
    shutil.copytree(corpus, tmp_path / "corpus")
    places = dict(inputs=["elsewhere://corpus/train"], held_out=("elsewhere://corpus/validation",))
    for _ in range(2):
        prepare(**places, out="elsewhere://out/data", record_tokens=RECORD)
    assert contents(tmp_path / "out/data") == contents(prepared)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the process in /proc")
def test_a_process_of_its_own_that_dies_ends_it_with_a_word(tmp_path):
    process = hola(*big(tmp_path), tmp_path / "out")
    while not list(tmp_path.glob("out/reports/*.json")) and process.poll() is None:
        time.sleep(0.02)
    begun = f"-m train.data.worker {process.pid}"
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if begun in place.read_bytes().replace(b"\0", b" ").decode() and b"sh" not in place.read_bytes()[:9]:
                os.kill(int(place.parent.name), KILL)
                break
    status, said = ended(process)
    assert status == 1 and "hola: a process died" in said and "run the same command again" in said
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes there")
def test_a_full_disk_is_said_and_leaves_nothing_that_lies(corpus, tmp_path):
    command = ["prepare", corpus / "train", "--tokenizer", "bytes", "--workers", 1, "--out", tmp_path / "out"]
    status, said = ended(hola(*command, before=small_disk(39)))
    assert status == 1 and "File too large" in said and "hola: cannot write" in said and "Traceback" not in said
    assert not (tmp_path / "out/manifest.json").exists() and not list(tmp_path.rglob("*.array_record"))
    prepare([corpus / "train"], tmp_path / "out")
    assert open_source(Records(str(tmp_path / "out")), split="train", vocab_size=256, row=64, seed=0)[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inputs": ()}, "no inputs"),
        ({"held_out": ("b",), "held_out_fraction": 0.1}, "give one of them"),
        ({"held_out_fraction": 1.5}, "at least 0 and below 1"),
        ({"record_tokens": 0}, "--record-tokens is 0"),
    ],
)
def test_a_wrong_option_is_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(Prepare(inputs=("a",), out="b"), **change)
