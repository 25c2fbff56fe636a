"""Curves on logarithmic axes as SVG text: what was measured as dots, what was fitted as lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

from autoplan.units import Unit, show

_WIDTH, _HEIGHT = 560, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 96, 14, 14, 44
Axis = tuple[str, Unit | None]
"""An axis' name, and the unit of its ticks."""
COLOURS = 6
"""Series have the CSS classes s0, s1, ...; further ones begin anew."""


@dataclass(frozen=True, slots=True)
class Series:
    """Dots with a title each, and a line; either may be empty."""

    name: str
    dots: tuple[tuple[float, float, str], ...] = ()
    line: tuple[tuple[float, float], ...] = ()


def loglog(series: Sequence[Series], label: str, x: Axis, y: Axis) -> str:
    """One chart; an axis is its name and the unit of its ticks. Empty without a dot."""
    places = [place for each in series for place in (*(dot[:2] for dot in each.dots), *each.line)]
    if not any(each.dots for each in series):
        return ""
    x_low, x_high = _span([a for a, _ in places])
    y_low, y_high = _span([b for _, b in places])

    def at(a: float, b: float) -> tuple[float, float]:
        across = (log10(a) - x_low) / (x_high - x_low)
        up = (log10(b) - y_low) / (y_high - y_low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    out = [*_grid((x_low, x_high), (y_low, y_high), at, x, y)]
    for number, each in enumerate(series):
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(a, b) for a, b in each.line))
        dots = "".join(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.4"><title>{escape(title)}</title></circle>'
            for (px, py), title in ((at(a, b), title) for a, b, title in each.dots)
        )
        path = f'<polyline points="{line}"/>' if line else ""
        out.append(f'<g class="s{number % COLOURS}">{path}{dots}</g>')
    return f'<svg class="curves" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(out)}</svg>'


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Exponents from and to, with a margin."""
    low, high = log10(min(values)), log10(max(values))
    margin = max(0.06 * (high - low), 0.05)
    return low - margin, high + margin


def _grid(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    at: Callable[[float, float], tuple[float, float]],
    x: Axis,
    y: Axis,
) -> Iterator[str]:
    floor_y = _HEIGHT - _BOTTOM
    for value in _ticks(*y_range):
        _, py = at(10.0 ** x_range[0], value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{escape(_said(value, y[1]))}</text>'
    for number, value in enumerate(_ticks(*x_range)):
        px, _ = at(value, 10.0 ** y_range[0])
        rare = " every-other" if number % 2 else ""
        yield f'<text class="tick{rare}" x="{px:.1f}" y="{floor_y + 17}" text-anchor="middle">{escape(_said(value, x[1]))}</text>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor_y}" y2="{floor_y}"/>'
    yield f'<text class="name" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{escape(x[0])}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten, at most five of them; where there is none or one, halves and fifths too."""
    powers = list(range(ceil(low), floor(high) + 1))
    if len(powers) < 2:
        return [m * 10.0**e for e in range(floor(low), ceil(high) + 1) for m in (1, 2, 5) if low <= log10(m * 10.0**e) <= high]
    step = ceil(len(powers) / 5)
    return [10.0**e for e in powers[::step]]


def _said(value: float, unit: Unit | None) -> str:
    if unit is None:
        return f"{value:g}"
    if unit.base != "B":
        return show(value, unit)
    for name, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:g} {name}"
    return f"{value:g} B"
