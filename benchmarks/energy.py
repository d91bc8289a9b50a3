"""What reads lose that keep a share of their softmax weights, and what a TPU's kernel need not bring then.

    hola demo --folder runs/three
    python benchmarks/energy.py runs/three/facts/hola runs/three/text/hola

Of each run by share: the answers for facts, or the repetitions in text, that were its first guess; the perplexity of
answers, or of text; and the entries kept of those in sight (the null sink is one). Nothing is trained anew. Then, with
W = 64 and C = 256 in place of its own, the tiles of values that one token brings, and that a tile of 128 queries would;
and what the kernel of one token moves with that share of values, at the 340M's sizes.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from hola_jax import LanguageModel, MemoryConfig
from hola_jax.diagnostics import Insight, entries_kept, insight, tiles_kept
from pallas_kernels.step.kernel import Call, bytes_moved
from train.compare import Files, Texts, held_out_files, measure
from train.config import TrainConfig
from train.data.config import Facts
from train.overrides import from_dict
from train.planted import planted
from train.trained import model_of
from train.weights import Saved, look

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
WIDE = MemoryConfig(window=64, block=256)
TILE, QUERIES = 16, 128  # rows of a tile of bfloat16; queries that a kernel of many tokens reads by at once
# Sixteen rows of a layer of the 340M, of which a kernel that keeps all of a read moves 55.9 MB (docs/performance.md).
STEP = Call(16, 4, 4, WIDE.block, WIDE.window, 256, 256, 1.0, 1.0, False, 0.9, jnp.bfloat16, False)
LOOKED_AT = 4  # texts that entries and tiles are counted in


def with_memory(saved: Saved, **changes: object) -> LanguageModel:
    """The trained model with another memory."""
    memory = dataclasses.replace(saved.config.memory, **changes)
    return model_of(dataclasses.replace(saved, config=dataclasses.replace(saved.config, memory=memory)))


def held_out(saved: Saved, rows: int, longest: int) -> Texts:
    """What the run is measured on."""
    if saved.config.mixer != "hola" or saved.about is None:
        raise SystemExit(f"{saved.folder} is not a run of HOLA")
    config = from_dict(TrainConfig, saved.about["config"])
    return planted(config, longest, rows) if isinstance(config.data, Facts) else held_out_files(config, longest)


def quality(saved: Saved, texts: Texts) -> None:
    print("| share | first guess right | perplexity | entries kept |\n|---|---|---|---|")
    found = [insight(model_of(saved), row) for row in longest(texts)]
    for share in (None, *SHARES):
        measured = measure(with_memory(saved, read_energy=share), texts, str(share))
        right, loss = (x.sum() / measured.recall.asked.sum() for x in (measured.recall.right, measured.recall.nats))
        perplexity = measured.perplexity if isinstance(texts, Files) else math.exp(loss)
        kept = "-" if share is None else f"{mean(entries_kept, found, share):.1%}"
        print(f"| {share or 'all'} | {right:.1%} | {perplexity:.3f} | {kept} |", flush=True)


def mean(count: Callable[..., Any], found: list[Insight], *given: float, **sizes: int) -> float:
    """Over texts, layers and heads."""
    return float(np.mean([count(each, *given, **sizes) for each in found]))


def longest(texts: Texts) -> list[np.ndarray]:
    """Some, of one length where there are: one compiled program looks into them."""
    return sorted(texts.rows, key=len)[-LOOKED_AT:]


def tiles(saved: Saved, texts: Texts) -> None:
    model = with_memory(saved, window=WIDE.window, block=WIDE.block, chunk=WIDE.chunk)
    found = [insight(model, row) for row in longest(texts)]
    print(f"\nW={WIDE.window} C={WIDE.block}, {sum(map(len, longest(texts)))} tokens\n")
    print(f"| share | entries kept | tiles for one token | tiles for {QUERIES} | step MB |\n|---|---|---|---|---|")
    for share in SHARES:
        kept = [mean(entries_kept, found, share)]
        kept += [mean(tiles_kept, found, share, block=WIDE.block, tile=TILE, queries=n) for n in (1, QUERIES)]
        moved = bytes_moved(STEP, kept[1]) / 1e6
        print(f"| {share} | {' | '.join(f'{each:.1%}' for each in kept)} | {moved:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of HOLA's runs in the demo")
    parser.add_argument("--rows", type=int, default=32, help="with facts")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a row, and of a file")
    options = parser.parse_args()
    for folder in options.runs:
        saved = look(folder)
        texts = held_out(saved, options.rows, options.longest)
        print(f"\n{folder}, {len(texts.rows)} texts of up to {options.longest} tokens\n")
        quality(saved, texts)
        tiles(saved, texts)


if __name__ == "__main__":
    main()
