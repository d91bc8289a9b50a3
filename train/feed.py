"""From the data's rows to batches on the mesh. The data is told what this process needs, and nothing of the mesh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np

from train.layout import INPUTS, Batch, Layout
from train.mesh import batch_shards

Rows = Any  # rows[i] is {"tokens", "segment_ids", "mask"}, each [T+1]


class Data(Protocol):
    """What the trainer asks of `train.data.loader`."""

    def open_source(self, source: Any, *, split: Any, vocab_size: int, row: int, seed: int) -> Rows:
        """The rows of the split "train" or "held_out"."""

    def batches(
        self, rows: Rows, *, position: int, global_batch: int, process: int, processes: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """This process's part of each global batch, from the row number `position` on."""

    def identity(self, source: Any) -> dict[str, Any]:
        """What a checkpoint keeps and compares."""


def inputs(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the step reads, each [B, T], of rows of T + 1 tokens: a target is the next token of the same document."""
    tokens, segments = rows["tokens"], rows["segment_ids"]
    counts = ((segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] > 0)).astype(np.uint8)
    if "mask" in rows:
        counts *= rows["mask"][:, :-1].astype(np.uint8)
    found = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments[:, :-1], "mask": counts}
    return {name: np.ascontiguousarray(found[name], kind) for name, kind in INPUTS.items()}


def share(layout: Layout) -> tuple[int, int]:
    """(which, of how many) equal parts of the rows of a global batch this process's devices need."""
    parts = batch_shards(layout.mesh)
    places = layout.batch_sharding.addressable_devices_indices_map((parts, layout.mesh.shape["sequence"]))
    needed = sorted({(place[0].start or 0) for place in places.values() if place})
    first, count = needed[0], len(needed)
    if needed != list(range(first, first + count)) or first % count or parts % count:
        raise ValueError(
            f"process {jax.process_index()} would need the parts {needed} of {parts} of a batch; arrange the mesh so that "
            "its devices are neighbours along data and fsdp"
        )
    return first // count, parts // count


def on_mesh(rows: dict[str, np.ndarray], layout: Layout, global_batch: int) -> Batch:
    """A process's part of the rows as the global batch."""
    found = inputs(rows)
    which, _ = share(layout)
    start = which * found["tokens"].shape[0]

    def place(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            of_rows = slice((index[0].start or 0) - start, (index[0].stop or global_batch) - start)
            return x[of_rows, index[1]]

        return jax.make_array_from_callback((global_batch, x.shape[1]), layout.batch_sharding, part)

    return {name: place(x) for name, x in found.items()}


def feed(data: Data, rows: Rows, layout: Layout, *, position: int, global_batch: int) -> Iterator[Batch]:
    """Batches on the mesh, from the row number `position` on."""
    process, processes = share(layout)
    parts = data.batches(rows, position=position, global_batch=global_batch, process=process, processes=processes)
    return (on_mesh(part, layout, global_batch) for part in parts)
