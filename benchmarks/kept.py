"""What the caches of runs on planted facts hold when the questions begin: the share of the values that were told.

    python benchmarks/kept.py runs/study/reads/rmsnorm.0 runs/study/scores/write.0

One line a run: of each layer and head, over 64 held-out rows with twelve facts.
"""

import sys

import jax
import numpy as np

from hola_jax.memory import cached_positions
from train.data.config import Facts
from train.data.facts import ASKED_FROM
from train.data.loader import open_source
from train.trained import model_of
from train.weights import look

ROWS, TASK = 64, Facts(most=12, fewest=12)


def share_kept(folder: str) -> np.ndarray:
    """[layers, heads]"""
    saved = look(folder)
    model = model_of(saved)
    if saved.config.mixer != "hola" or saved.about is None:
        raise SystemExit(f"{folder} is not a run of HOLA")
    row = saved.about["config"]["row"]
    rows = open_source(TASK, split="held_out", vocab_size=model.config.vocab_size, row=row, seed=0)
    told = int(row * ASKED_FROM)
    tokens = np.stack([rows[number]["tokens"][:told] for number in range(ROWS)])
    _, state = jax.jit(model)(tokens)
    held = np.asarray(jax.vmap(cached_positions)(state.memory))  # [N B H W]
    values = np.pad(tokens >= model.config.vocab_size - TASK.kinds, [(0, 0), (0, 1)])  # -1, an empty slot, holds none
    kept = values[np.arange(ROWS)[:, None, None], held]
    return kept.sum((1, 3)) / values.sum()


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(folder, " ".join(f"{share:.2f}" for share in share_kept(folder).ravel()))
