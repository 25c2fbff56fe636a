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
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 16, 30, 46
_LETTER, _LINE = 10.6, 20.0
"""Of a label as a phone shows it, where letters are largest beside the picture."""
_GAP = 11
"""From the middle of a mark to its label."""
_SHIFTS = tuple(sign * n * _LINE for n in range(5) for sign in ((-1, 1) if n else (1,)))
"""Lines that a label may stand away from its mark, the nearest first."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


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


def scatter(
    points: Sequence[Point],
    label: str,
    x_name: str,
    y_name: str,
    limit: float,
    limit_text: str,
    line: Sequence[tuple[float, float]] = (),
) -> str:
    """Time (down is better) against memory; what lies beyond `limit` does not fit. The last points are drawn on top, all of them
    on the line."""
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
    out.append(f'<text class="name" x="8" y="{_TOP - 10}">{escape(y_name)}</text>')
    if line:
        out.append(
            f'<polyline class="stair" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*place) for place in line))}"/>'
        )
    places = [(point, *at(point.x, point.y)) for point in points]
    out += [_mark(*place) for place in places]
    said = (edge - 5 - _LETTER * len(limit_text), _TOP - 3.0, edge, _TOP + 16.0)
    out += _labels(places, edge, said)
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


def _labels(places: Sequence[tuple[Point, float, float]], edge: float, said: Box) -> list[str]:
    """Labels that do not reach over the limit or the frame and lie on no other one, and if there is room on no mark. First those
    that fit beside their marks, then the others, nearby, with a line to theirs; one without a place is left out (it stands in
    the table)."""
    out, words = [], [said]
    marks = [(x - 7, y - 7, x + 7, y + 7) for point, x, y in places if point.kind in ("chosen", "slower", "baseline")]
    left = [place for place in reversed(places) if place[0].label]
    for shifts, taken in ((_SHIFTS[:1], marks), (_SHIFTS, marks), (_SHIFTS, [])):
        for point, x, y in tuple(left):
            found = _place(point, x, y, edge, shifts, (*words, *taken))
            if found is not None:
                words.append(found[0])
                out.append(_label(point, x, y, *found[1:]))
                left.remove((point, x, y))
    return out


def _label(point: Point, x: float, y: float, side: int, shift: float) -> str:
    start, anchor = x + side * _GAP, "start" if side > 0 else "end"
    lead = f'<path class="lead" d="M{x:.1f} {y:.1f}L{start - 3 * side:.1f} {y + shift:.1f}"/>' if shift else ""
    place = f'x="{start:.1f}" y="{y + shift + 5:.1f}" text-anchor="{anchor}"'
    return f'{lead}<text class="label" {place}>{escape(point.label)}</text>'


def _place(
    point: Point, x: float, y: float, edge: float, shifts: Sequence[float], taken: Sequence[Box]
) -> tuple[Box, int, float] | None:
    """The first free (box, side of the mark, shift from the mark's line) of a label."""
    width = _LETTER * len(point.label)
    for shift in shifts:
        top = y + shift - _LINE / 2
        if not _TOP - 4 <= top <= _HEIGHT - _BOTTOM - _LINE:
            continue
        for side in (1, -1):
            left = x + _GAP if side > 0 else x - _GAP - width
            box = (left, top, left + width, top + _LINE)
            crosses = x < edge < box[2]
            if left >= _LEFT and box[2] <= _WIDTH - 4 and not crosses and not any(_meet(box, other) for other in taken):
                return box, side, shift
    return None


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


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
