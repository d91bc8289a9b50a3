"""A plot as a small SVG: a line for each name, the mean over its runs, and a thin one for each of several runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from html import escape

Curve = list[tuple[float, float]]
WIDTH, HEIGHT, LEFT, TOP, BELOW, LEGEND = 640, 360, 64, 16, 48, 150
COLOURS = ("#4063d8", "#cb3c33", "#389826", "#9558b2", "#b8860b", "#20808d", "#808080", "#d16ba5")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers from low to high."""
    rough = (high - low) / count or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def svg(curves: dict[str, list[Curve]], x_name: str, y_name: str, *, logarithmic: bool = False) -> str:
    """Points of a name that not all of its runs have are left out. `logarithmic` is what lies across."""
    lines = {name: _together(runs) for name, runs in curves.items()}
    scale: Callable[[float], float] = math.log2 if logarithmic else float
    points = [(x, y) for line in lines.values() for x, values in line for y in values]
    if not points:
        raise ValueError("there is nothing to plot: no curve has a point that all of its runs have")
    (x_low, x_high), (y_low, y_high) = ((min(z), max(z)) for z in zip(*points, strict=True))
    y_low, y_high = y_low - 0.03 * (y_high - y_low), y_high + 0.03 * (y_high - y_low)
    right, bottom = WIDTH - LEGEND, HEIGHT - BELOW

    def place(x: float, y: float) -> str:
        across = (scale(x) - scale(x_low)) / ((scale(x_high) - scale(x_low)) or 1.0)
        up = (y - y_low) / ((y_high - y_low) or 1.0)
        return f"{LEFT + across * (right - LEFT):.1f},{bottom - up * (bottom - TOP):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for y in ticks(y_low, y_high):
        left, at = place(x_low, y).split(",")
        parts.append(f'<path d="M{left} {at}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(at) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in sorted({x for x, _ in points}) if logarithmic else ticks(x_low, x_high):
        at = place(x, y_low).split(",")[0]
        parts.append(
            f'<text x="{at}" y="{bottom + 18}" text-anchor="middle">{f"{x:g}" if logarithmic else _short(x)}</text>'
        )
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        runs = len(curves[name])
        for run in range(runs if runs > 1 else 0):
            single = " ".join(place(x, ys[run]) for x, ys in line)
            parts.append(f'<polyline points="{single}" fill="none" stroke="{colour}" opacity="0.4"/>')
        middle = " ".join(place(x, statistics.mean(ys)) for x, ys in line)
        parts.append(f'<polyline points="{middle}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{right + 10}" y="{TOP + 12 + 18 * number}" fill="{colour}">{escape(name)}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_name)}</text>')
    parts.append(
        f'<text transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


def _together(runs: list[Curve]) -> list[tuple[float, list[float]]]:
    """(x, the y of each run) where all runs have the x."""
    values = [dict(run) for run in runs]
    common = set.intersection(*(set(each) for each in values)) if values else set()
    return [(x, [each[x] for each in values]) for x in sorted(common)]


def _short(x: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= unit:
            return f"{x / unit:.4g}{name}"
    return f"{x:.4g}"
