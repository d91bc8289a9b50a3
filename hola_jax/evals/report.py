"""Scores as JSON and as tables: each cell, and by depth."""

from __future__ import annotations

from typing import Any

from hola_jax.evals.tasks import Cell, Measured, shown_length

BINS = 5  # of depth


def record(cell: Cell, measured: Measured, seconds: float) -> dict[str, Any]:
    """What is kept of a cell's evaluation."""
    found: dict[str, Any] = {"task": cell.task, "length": cell.length, **measured.metrics}
    if measured.depths:
        found["by_depth"] = by_depth(measured.depths)
    return {**found, "seconds": round(seconds, 2), "about": cell.about}


def by_depth(depths: tuple[tuple[float, float], ...], bins: int = BINS) -> list[dict[str, float | None]]:
    """The mean score of each fifth of the context, with how many answers stood there."""
    parts: list[list[float]] = [[] for _ in range(bins)]
    for depth, score in depths:
        parts[min(int(depth * bins), bins - 1)].append(score)
    return [
        {"from": n / bins, "to": (n + 1) / bins, "score": sum(part) / len(part) if part else None, "answers": len(part)}
        for n, part in enumerate(parts)
    ]


def table(records: list[dict[str, Any]]) -> str:
    """A line for each cell: its scores, and those of each fifth of the context."""
    fixed = ("task", "length", "by_depth", "seconds", "about")
    metrics = list(dict.fromkeys(name for each in records for name in each if name not in fixed))
    deep = any("by_depth" in each for each in records)
    depths = [f"{100 * n // BINS}-{100 * (n + 1) // BINS}%" for n in range(BINS)] if deep else []
    rows = [["task", "length", *metrics, *depths]]
    for each in records:
        scores = [_shown(each.get(name)) for name in metrics]
        parts = each.get("by_depth", [{"score": None}] * BINS) if deep else []
        rows.append([each["task"], _length(each["length"]), *scores, *(_shown(part["score"]) for part in parts)])
    return _lines(rows)


def by_length(records: list[dict[str, Any]]) -> str:
    """Accuracy, a line for each task and a column for each length; empty where there are no two lengths."""
    found = {
        (each["task"], each["length"]): each["accuracy"] for each in records if each["length"] and "accuracy" in each
    }
    lengths = sorted({length for _, length in found})
    tasks = list(dict.fromkeys(task for task, _ in found))
    if len(lengths) < 2:
        return ""
    rows = [[task, *(_shown(found.get((task, length))) for length in lengths)] for task in tasks]
    return _lines([["accuracy", *map(shown_length, lengths)], *rows])


def _length(length: int | None) -> str:
    return "" if length is None else shown_length(length)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _lines(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(each.rjust(width) for each, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
