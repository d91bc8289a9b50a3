"""Two small pictures as SVG text: bars and curves. Colours are the page's, by class; nothing else is needed to show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, LEFT, RIGHT = 400, 44, 12


class Curve(NamedTuple):
    """Shares between 0 and 1 with their standard errors; NaN where nothing was measured."""

    share: Sequence[float]
    error: Sequence[float]


def bars(values: Mapping[str, float], names: Mapping[str, str], label: str) -> str:
    """Horizontal bars from zero, each with its name and number; keys are classes, which have colours."""
    top, row = max(values.values()), 26
    marks = []
    for place, (key, value) in enumerate(values.items()):
        y, length = place * row, (WIDTH - 180) * value / top
        marks.append(f'<text x="124" y="{y + 17}" class="end">{escape(names[key])}</text>')
        marks.append(f'<rect x="130" y="{y + 4}" width="{length:.1f}" height="18" rx="2" class="fill {key}"/>')
        marks.append(f'<text x="{136 + length:.1f}" y="{y + 17}">{value:.2f}</text>')
    return _svg(len(values) * row, label, marks)


def curves(
    labels: Sequence[str], found: Mapping[str, Curve], names: Mapping[str, str], label: str, reach: int, beyond: str
) -> str:
    """Shares over named ranges, whiskers of one standard error; behind the range `reach` a line that says `beyond`."""
    height, low = 230, 190
    known = np.array([[s + e, s - e] for curve in found.values() for s, e in zip(*curve, strict=True)])
    most = np.nanmax(known) if np.isfinite(known).any() else 1.0
    top = next((share for share in (0.04, 0.08, 0.2, 0.4, 0.6, 0.8) if most <= share), 1.0)
    step = (WIDTH - LEFT - RIGHT) / len(labels)

    def x(place: float) -> float:
        return LEFT + step * (place + 0.5)

    def y(share: float) -> float:
        return low - (low - 24) * share / top

    marks = []
    for tick in np.linspace(0, top, 5):
        marks.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" class="grid"/>')
        marks.append(f'<text x="{LEFT - 5}" y="{y(tick) + 4:.1f}" class="end">{tick:.0%}</text>')
    for place, text in enumerate(labels):
        marks.append(f'<text x="{x(place):.1f}" y="{low + 16}" class="middle">{escape(text)}</text>')
    marks.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{low + 34}" class="middle">tokens since it last stood there</text>'
    )
    if reach < len(labels):
        line = x(reach - 0.5)
        marks.append(f'<line x1="{line:.1f}" x2="{line:.1f}" y1="18" y2="{low}" class="reach"/>')
        marks.append(f'<text x="{line + 4:.1f}" y="14">{escape(beyond)}</text>')
    for shift, (key, curve) in enumerate(found.items()):
        points = [(x(place) + 4 * (shift - 1), s, e) for place, (s, e) in enumerate(zip(*curve, strict=True))]
        points = [point for point in points if np.isfinite(point[1])]
        path = " ".join(f"{a:.1f},{y(s):.1f}" for a, s, _ in points)
        marks.append(f'<polyline points="{path}" class="line {key}"/>')
        for a, s, e in points:
            marks.append(
                f'<line x1="{a:.1f}" x2="{a:.1f}" y1="{y(s - e):.1f}" y2="{y(s + e):.1f}" class="line {key}"/>'
            )
            marks.append(f'<circle cx="{a:.1f}" cy="{y(s):.1f}" r="3" class="fill {key}"/>')
    legend = "".join(f'<span class="key {key}">{escape(names[key])}</span>' for key in found)
    return _svg(height, label, marks) + f'<p class="legend">{legend}</p>'


def _svg(height: int, label: str, marks: list[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label, quote=True)}">'
    return head + "".join(marks) + "</svg>"
