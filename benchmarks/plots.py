"""Scatter plots for docs/accuracy.md: predicted against measured, on axes of powers of ten, as small SVG files.

One file a source, seconds of a step on the left and bytes of the peak on the right where the source tells them. Held-out rows are
dots, fitted ones rings; the line is perfection, the band 20 % to either side of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, floor, log10
from pathlib import Path
from typing import NamedTuple

SIDE, MARGIN, TOP = 260, 44, 26
BAND = 0.2
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#555}.h{fill:#2563eb;fill-opacity:.55}.f{fill:none;stroke:#9ca3af}"
    ".g{stroke:#8884;stroke-width:.6}.l{stroke:#888}.b{fill:#8882}.t{font-weight:600;font-size:12px}"
)
MOST = 400
"""Points of one panel; of a larger source every n-th is drawn."""


class Point(NamedTuple):
    """A row: what was measured, what was predicted, and whether it was held out."""

    measured: float
    predicted: float
    held_out: bool


def write(folder: Path, name: str, seconds: Sequence[Point], gibibytes: Sequence[Point]) -> Path:
    """The plot of one source in `folder`; its file name is made of the source's."""
    panels = [("seconds of a step", seconds)] + ([("GiB of the fullest rank", gibibytes)] if gibibytes else [])
    path = folder / f"{name.replace(' ', '-').replace(',', '')}.svg"
    path.write_text(svg(name, panels), encoding="utf-8")
    return path


def svg(name: str, panels: Sequence[tuple[str, Sequence[Point]]]) -> str:
    """The text of an SVG file with the panels (title, points) side by side."""
    width, height = len(panels) * (SIDE + MARGIN) + 16, SIDE + MARGIN + TOP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
    parts = [head, f"<title>{name}: predicted against measured</title>", f"<style>{STYLE}</style>"]
    for i, (title, points) in enumerate(panels):
        parts += _panel(f"{name}, {title}", points, MARGIN + i * (SIDE + MARGIN))
    return "\n".join([*parts, "</svg>\n"])


def _panel(title: str, points: Sequence[Point], left: float) -> Iterable[str]:
    values = [value for point in points for value in point[:2] if value > 0]
    low, high = log10(min(values)), log10(max(values))
    low, high = floor(low * 4) / 4, max(ceil(high * 4) / 4, floor(low * 4) / 4 + 0.25)

    def x(value: float) -> float:
        return round(left + SIDE * (log10(value) - low) / (high - low), 1)

    def y(value: float) -> float:
        return round(TOP + SIDE * (1 - (log10(value) - low) / (high - low)), 1)

    first, last = 10**low, 10**high
    yield f'<text class="t" x="{left}" y="14">{title}</text>'
    corners = ((first, first), (first * (1 + BAND), first), (last, last / (1 + BAND)), (last, last))
    lower = " ".join(f"{x(a)},{y(b)}" for a, b in corners)
    upper = " ".join(f"{x(b)},{y(a)}" for a, b in corners)
    yield f'<polygon class="b" points="{lower}"/><polygon class="b" points="{upper}"/>'
    for tick in _ticks(low, high):
        yield f'<path class="g" d="M{x(tick)} {TOP}v{SIDE}M{left} {y(tick)}h{SIDE}"/>'
        yield f'<text x="{x(tick)}" y="{TOP + SIDE + 14}" text-anchor="middle">{tick:g}</text>'
        yield f'<text x="{left - 4}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>'
    yield f'<path class="l" d="M{x(first)} {y(first)}L{x(last)} {y(last)}"/>'
    for point in points[:: max(1, ceil(len(points) / MOST))]:
        kind, radius = ("h", 2.6) if point.held_out else ("f", 2.2)
        yield f'<circle class="{kind}" cx="{x(point.measured)}" cy="{y(point.predicted)}" r="{radius}"/>'
    yield f'<text x="{left + SIDE / 2}" y="{TOP + SIDE + 28}" text-anchor="middle">measured (across), predicted (up)</text>'


def _ticks(low: float, high: float) -> Iterable[float]:
    """1, 2 and 5 times powers of ten within the axis; few."""
    steps = (1,) if high - low > 2 else (1, 3) if high - low > 1 else (1, 2, 5)
    for power in range(floor(low), ceil(high) + 1):
        for step in steps:
            value: float = step * 10.0**power
            if low - 1e-9 <= log10(value) <= high + 1e-9:
                yield value
