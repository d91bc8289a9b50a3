"""What a read would keep of what it sees, were it to keep a share of its softmax weights (`MemoryConfig.read_energy`)."""

from __future__ import annotations

import numpy as np

from hola_jax.array_types import Array, Bool, Float
from hola_jax.diagnostics.insight import Insight


def entries_kept(found: Insight, energy: float) -> Float[Array | np.ndarray, "N H"]:
    """Of the entries visible to a token, the null sink among them: the share that a read of `energy` keeps, in the mean over
    the tokens of a text that `insight` looked into without it."""
    kept, weights = _kept(found, energy)
    return np.mean(np.count_nonzero(kept, axis=-1) / np.count_nonzero(weights > 0, axis=-1), axis=1)


def tiles_kept(
    found: Insight, energy: float, *, block: int, tile: int, queries: int = 1
) -> Float[Array | np.ndarray, "N H"]:
    """Of the values of cache and running block, in tiles of `tile` rows as they lie in memory: the share of tiles of which a
    read of `energy` keeps something or that holds the token itself; or one of so many successive `queries` does. These are
    what a TPU's kernel of one token brings (`queries` is 1, and a tile 32 bytes of each channel)."""
    window, length = found.kept.shape[-1], found.weights.shape[1] // block * block
    for name, size in (("tile", tile), ("queries", queries)):
        if block % size or (name == "tile" and window % size):
            raise ValueError(
                f"{name} is {size}; it must divide the block of {block} tokens and a tile the window of {window}"
            )
    if not length:
        raise ValueError(f"the text has {found.weights.shape[1]} tokens; there must be at least a block of {block}")
    kept = _kept(found, energy)[0][..., :-1]
    shares = []
    for start in range(0, length, block):
        tokens = kept[:, start : start + block]
        cached = np.asarray(found.kept)[:, start // block][:, None]  # [N 1 H W]
        in_cache = np.take_along_axis(tokens, np.maximum(cached, 0), axis=-1) & (cached >= 0)
        in_block = tokens[..., start : start + block] | np.eye(block, dtype=bool)[None, :, None]
        rows = np.concatenate([in_cache, in_block], axis=-1)
        needed = rows.reshape(*rows.shape[:3], -1, tile).any(-1)  # by each token
        needed = needed.reshape(needed.shape[0], -1, queries, *needed.shape[2:]).any(2)
        shares.append(needed.mean((1, 3)))
    return np.mean(shares, axis=0)


def _kept(found: Insight, energy: float) -> tuple[Bool[np.ndarray, "N T H X"], Float[np.ndarray, "N T H X"]]:
    """(which entries a read keeps, all weights): by position, the null sink last."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy!r}; it must be a share in (0, 1]")
    weights = np.concatenate([found.weights, np.asarray(found.sink)[..., None]], axis=-1)
    ordered = -np.sort(-weights, axis=-1)
    kept = (np.cumsum(ordered, axis=-1) - ordered < energy) & (ordered > 0)
    least = np.min(np.where(kept, ordered, np.inf), axis=-1, keepdims=True)
    return weights >= least, weights
