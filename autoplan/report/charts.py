"""Numbers -> SVG text. Colours are CSS classes of the page, so that a chart follows its theme; `<title>` serves the hover.

Shapes only in the bars (their words stand in a table beside them, where they keep their size on a phone); the scatter
carries its own text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

from autoplan.report.facts import Part

BAR_WIDTH = 1000
BAR_HEIGHT = 44

_WIDTH, _HEIGHT = 600, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 30, 46
_LETTER, _LINE = 10.0, 20.0
"""Of a label as a phone shows it, where letters are largest beside the picture."""


@dataclass(frozen=True, slots=True)
class Point:
    """A mark of the scatter. `kind` is a CSS class that also picks the shape."""

    x: float
    y: float
    kind: str
    title: str
    label: str = ""


def stacked_bar(parts: Sequence[Part], label: str, limit: float | None = None, limit_text: str = "", longest: float = 0.0) -> str:
    """One bar of parts side by side. With a `limit` the bar's background is what may be used, and a mark shows its end.
    Bars that are compared are told the `longest` of them, for one scale."""
    total = sum(part.value for part in parts)
    whole = max(total, limit or 0.0, longest) or 1.0
    scale = BAR_WIDTH / whole
    shapes, x = [], 0.0
    for part in parts:
        width = part.value * scale
        if width > 0:
            title = escape(f"{part.label}: {part.text} ({part.share:.1%})".replace("%", " %"))
            place = f'x="{x:.2f}" y="0" width="{width:.2f}" height="{BAR_HEIGHT}"'
            shapes.append(f'<rect class="k-{escape(part.key)}" {place}><title>{title}</title></rect>')
        x += width
    if limit is not None:
        at = min(limit * scale, BAR_WIDTH - 3.0)
        place = f'x="{at:.2f}" y="0" width="3" height="{BAR_HEIGHT}"'
        shapes.append(f'<rect class="limit" {place}><title>{escape(limit_text)}</title></rect>')
    frame = f'viewBox="0 0 {BAR_WIDTH} {BAR_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(label)}"'
    return f'<svg class="bar" {frame}><rect class="ground" width="{BAR_WIDTH}" height="{BAR_HEIGHT}"/>{"".join(shapes)}</svg>'


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, about so many of them."""
    span = high - low or abs(high) or 1.0
    rough = span / about
    power = 10.0 ** floor(log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [i * step for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def scatter(points: Sequence[Point], label: str, x_name: str, y_name: str, limit: float, limit_text: str) -> str:
    """Time (down is better) against memory; what lies beyond `limit` does not fit. The last points are drawn on top."""
    x_high = max([limit * 1.08, *(point.x * 1.03 for point in points)])
    ys = [point.y for point in points]
    margin = (max(ys) - min(ys)) * 0.12 or max(ys) * 0.1
    y_low, y_high = max(0.0, min(ys) - margin), max(ys) + margin

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + x / x_high * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    edge, _ = at(limit, y_low)
    floor_y = _HEIGHT - _BOTTOM
    out = [f'<rect class="beyond" x="{edge:.1f}" y="{_TOP}" width="{_WIDTH - _RIGHT - edge:.1f}" height="{floor_y - _TOP}"/>']
    for tick in ticks(y_low, y_high):
        _, y = at(0, tick)
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(0, x_high):
        x, _ = at(tick, y_low)
        out.append(f'<text class="tick" x="{x:.1f}" y="{floor_y + 17}" text-anchor="middle">{tick:g}</text>')
    out.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor_y}" y2="{floor_y}"/>')
    out.append(f'<line class="edge" x1="{edge:.1f}" x2="{edge:.1f}" y1="{_TOP}" y2="{floor_y}"/>')
    out.append(f'<text class="tick" x="{edge - 5:.1f}" y="{_TOP + 12}" text-anchor="end">{escape(limit_text)}</text>')
    out.append(f'<text class="name" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{escape(x_name)}</text>')
    out.append(f'<text class="name" x="{_LEFT - 44}" y="{_TOP - 10}">{escape(y_name)}</text>')
    out += [_mark(point, *at(point.x, point.y)) for point in points]
    taken = [(edge - 5 - _LETTER * len(limit_text), _TOP + 12.0, _LETTER * len(limit_text))]
    out += _labels([(point, *at(point.x, point.y)) for point in points if point.label], edge, taken)
    return f'<svg class="scatter" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(out)}</svg>'


def _mark(point: Point, x: float, y: float) -> str:
    shapes = {
        "chosen": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7.5"/>',
        "slower": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>',
        "bound": f'<path d="M{x - 5:.1f} {y + 4:.1f}h10l-5 -9z"/>',
        "refused": f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"/>',
        "baseline": f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"/>',
    }
    return f'<g class="m-{escape(point.kind)}">{shapes[point.kind]}<title>{escape(point.title)}</title></g>'


def _labels(marks: Sequence[tuple[Point, float, float]], edge: float, taken: list[tuple[float, float, float]]) -> list[str]:
    """Labels beside their marks, on the side where they cross neither the limit nor the frame, and not on one another or on
    what is `taken`: (left, line, width)."""
    out = []
    for point, x, y in marks:
        width = _LETTER * len(point.label)
        right = x + 11 + width <= (edge if x < edge else _WIDTH - 4)
        left = x + 11 if right else x - 11 - width
        lines = [s for s in (5, 5 - _LINE, 5 + _LINE, 5 - 2 * _LINE, 5 + 2 * _LINE) if _TOP < y + s < _HEIGHT - _BOTTOM - 3]
        shift = next((s for s in lines if not _hits(taken, left, y + s, width)), 5)
        taken.append((left, y + shift, width))
        anchor = "start" if right else "end"
        place = f'x="{x + 11 if right else x - 11:.1f}" y="{y + shift:.1f}" text-anchor="{anchor}"'
        out.append(f'<text class="label" {place}>{escape(point.label)}</text>')
    return out


def _hits(taken: Sequence[tuple[float, float, float]], left: float, y: float, width: float) -> bool:
    return any(
        abs(y - other_y) < _LINE and left < other + other_width and other < left + width for other, other_y, other_width in taken
    )


def matrix(style: str, parts: int) -> str:
    """A weight as it multiplies from the right, cut as the plan cuts it; one device's share is filled. Of experts a stack."""
    parts = min(max(parts, 1), 8)
    step = 24 / parts
    if style == "experts":
        parts, step = min(parts, 4), 24 / min(parts, 4)
        gap = step / 4
        sheets = "".join(f"M0 {i * step:.2f}h24v{step - gap:.2f}h-24z" for i in range(parts))
        mine = f'<rect class="mine" width="24" height="{step - gap:.2f}"/>'
        return _drawing(mine, sheets)
    filled = {
        "columns": f'<rect class="mine" width="{step:.2f}" height="24"/>',
        "rows": f'<rect class="mine" width="24" height="{step:.2f}"/>',
    }.get(style, '<rect class="mine" width="24" height="24"/>')
    cuts = ""
    if style in ("columns", "rows"):
        cuts = "".join(f"M{i * step:.2f} 0v24" if style == "columns" else f"M0 {i * step:.2f}h24" for i in range(1, parts))
    return _drawing(filled, f"M0 0h24v24h-24z{cuts}")


def _drawing(filled: str, lines: str) -> str:
    return (
        f'<svg class="matrix" viewBox="-1 -1 26 26" width="26" height="26" aria-hidden="true">{filled}<path d="{lines}"/></svg>'
    )
