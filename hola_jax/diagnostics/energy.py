"""What a read would keep of what it sees, were it to keep a share of its softmax weights (`MemoryConfig.read_energy`)."""

from __future__ import annotations

import numpy as np

from hola_jax.array_types import Array, Float
from hola_jax.diagnostics.insight import Insight


def entries_kept(found: Insight, energy: float) -> Float[Array | np.ndarray, "N H"]:
    """Of the entries visible to a token, the null sink among them: the share that a read of `energy` keeps, in the mean over
    the tokens of a text that `insight` looked into without it."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy!r}; it must be a share in (0, 1]")
    weights = np.concatenate([found.weights, np.asarray(found.sink)[..., None]], axis=-1)
    ordered = -np.sort(-weights, axis=-1)
    kept = np.cumsum(ordered, axis=-1) - ordered < energy
    visible = np.count_nonzero(ordered > 0, axis=-1)
    share = np.count_nonzero(kept & (ordered > 0), axis=-1) / visible
    return np.mean(share, axis=1)
