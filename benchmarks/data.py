"""The speed of `hola prepare` and of the loader, on text made on the spot: `python benchmarks/data.py --help`.

The text is words of made-up spelling, as frequent as the ranks of real words are, in documents of about 5 kB, the mean of
SlimPajama's. `--inputs` takes real text instead.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from train.data import assemble, inputs, tokenise, tokenizers
from train.data.config import Records
from train.data.loader import batches, open_source
from train.data.prepare import Prepare, cores
from train.data.record import token_type
from train.data.shards import read_manifest
from train.data.tokenise import Settings


def make_text(folder: Path, megabytes: int, files: int = 8) -> None:
    """JSON lines of made-up text."""
    draw = np.random.default_rng(0)
    letters = np.array(list("eeeetttaaooiinnsshhrrdlcumwfgypbvk"))
    words = np.array(["".join(draw.choice(letters, size=1 + draw.poisson(4))) for _ in range(50_000)])
    chances = 1 / np.arange(10, len(words) + 10)
    for number in range(files):
        with gzip.open(folder / f"made_{number}.jsonl.gz", "wt", compresslevel=1) as file:
            for _ in range(megabytes * 10**6 // files // 5000):
                text = " ".join(draw.choice(words, size=850, p=chances / chances.sum()))
                file.write(json.dumps({"text": text}) + "\n")


def time_one_core(places: list[str], tokenizer: tokenizers.Tokenizer, out: str) -> None:
    """The work of `hola prepare` without Beam, in this process."""
    tokenizers.one_thread()
    settings = Settings(tokenizer.hash, token_type(tokenizer.vocab_size), 2048, "text", 0.01)
    tasks = inputs.tasks(inputs.found(places, "inputs"), "train")
    start, busy = time.perf_counter(), time.process_time()
    for task in tasks:
        tokenise.run(task, settings, tokenizer, out, 0)
    wall, busy = time.perf_counter() - start, time.process_time() - busy
    reports = [assemble.report_of(task, settings, out, assemble.sizes_in(out)) for task in tasks]
    size = sum(split["bytes"] for report in reports if report for split in report["splits"].values()) / 1e6
    print(
        f"one core, {tokenizer.name:12} {size / busy:6.2f} MB/s of its own time, {size / wall:6.2f} MB/s by the clock"
    )


def time_prepare(places: list[str], tokenizer: str, out: str) -> None:
    """The command itself, with its start and its processes."""
    start = time.perf_counter()
    Prepare(tuple(places), out, tokenizer=tokenizer).run()
    wall = time.perf_counter() - start
    size = sum(split.bytes for split in read_manifest(out).splits.values()) / 1e6
    print(f"hola prepare          {size / wall:6.2f} MB/s by the clock on {cores()} cores, {size:.0f} MB")


def time_loader(out: str, row: int, global_batch: int, seconds: float) -> None:
    for workers in (0, 2):
        rows = open_source(Records(out), split="train", vocab_size=2**17, row=row, seed=0)
        found = batches(rows, position=0, global_batch=global_batch, workers=workers)
        next(found)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            count += next(found)["tokens"][:, 1:].size
        rate = count / (time.perf_counter() - start) / 1e6
        print(f"loader, T = {row}, {workers} worker processes: {rate:6.1f} M tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", nargs="*", help="folders of JSON lines to use instead of made-up text")
    parser.add_argument("--megabytes", type=int, default=60, help="of made-up text")
    parser.add_argument("--tokenizers", nargs="*", default=["mistral-v1", "bpe"])
    parser.add_argument("--row", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5)
    given = parser.parse_args()
    print(f"{cores()} cores, load {os.getloadavg()[0]:.1f} before")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not given.inputs:
            (folder / "text").mkdir()
            make_text(folder / "text", given.megabytes)
        places = given.inputs or [f"{folder}/text"]
        for kind in given.tokenizers:
            if kind == "bpe":  # learnt from the text, 32000 entries
                kind = f"{folder}/bpe-32000.json"
                sample = Prepare(tuple(places), "", train_tokenizer=32000, train_tokenizer_mb=20)
                texts = sample.sample(inputs.tasks(inputs.found(places, "inputs"), "train"))
                Path(kind).write_bytes(tokenizers.train_bpe(texts, 32000))
            time_one_core(places, tokenizers.load(kind), f"{folder}/one-{Path(kind).stem}")
        time_prepare(places, given.tokenizers[0], f"{folder}/out")
        time_loader(f"{folder}/out", given.row, given.batch, given.seconds)


if __name__ == "__main__":
    main()
