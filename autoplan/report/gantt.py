"""A film of the pipeline -> SVG text: a row for every rank, a box for every stretch of work.

Places are percentages of the picture's width, so that a wider picture (the page's zoom) has wider boxes and letters of the
same size. A number stands in its box from the zoom on at which it has room: `z1` always, `z8` at eight times the width.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from autoplan.report import words
from autoplan.report.pipeline import Film, Fold, Shot

ROW, SPACE, AXIS = 26, 5, 24
WIDTH = 960
"""Pixels that the picture is taken to have at least, when it is asked whether a number has room."""

ZOOMS = (1, 2, 4, 8)
TITLED = 500
"""Boxes up to which each one says what it is when the mouse is over it."""


def height(film: Film) -> int:
    """Of the picture, in pixels."""
    return len(film.ranks) * (ROW + SPACE) + AXIS


def gantt(film: Film, label: str) -> str:
    """The whole picture."""
    titled = sum(map(len, film.shots)) <= TITLED
    rows = "".join(_row(film, shots, y * (ROW + SPACE), titled) for y, shots in enumerate(film.shots))
    floor = len(film.ranks) * (ROW + SPACE) - SPACE
    folds = "".join(_fold(fold, floor) for fold in film.folds)
    frame = f'width="100%" height="{height(film)}" role="img" aria-label="{escape(label)}"'
    return f'<svg class="timeline" id="timeline" {frame}>{rows}{folds}{"".join(_axis(film, floor))}</svg>'


def _row(film: Film, shots: tuple[Shot, ...], y: int, titled: bool) -> str:
    boxes = [f'<rect class="idle" width="100%" height="{ROW}"/>']
    for name in ("f", "b", "w") if film.split else ("f", "b"):
        for chunk in range(film.chunks):
            mine = [shot for shot in shots if shot.chunk == chunk and _kind(shot) == name]
            inner = "".join(_box(film, shot, titled) for shot in mine)
            boxes.append(f'<g class="{name} q{chunk % 4}">{inner}</g>')
    return f'<g transform="translate(0 {y})">{"".join(boxes)}</g>'


def _kind(shot: Shot) -> str:
    return "w" if shot.weights else "b" if shot.backward else "f"


def _box(film: Film, shot: Shot, titled: bool) -> str:
    width = shot.end - shot.start
    place = f'x="{_percent(shot.start)}" width="{_percent(width)}" height="{ROW}"'
    box = f"<rect {place}>{_title(film, shot)}</rect>" if titled else f"<rect {place}/>"
    text = str(shot.micro_batch)
    zoom = next((zoom for zoom in ZOOMS if width * WIDTH * zoom >= 6.5 * len(text) + 2), None)
    if zoom is None:
        return box
    return f'{box}<text class="z{zoom}" x="{_percent(shot.start + width / 2)}" y="17">{text}</text>'


def _title(film: Film, shot: Shot) -> str:
    chunk = f", chunk {shot.chunk}" if film.chunks > 1 else ""
    way = words.pass_of(shot.backward, shot.weights, film.split)
    when = f": {words.seconds(shot.when[0])} to {words.seconds(shot.when[1])}" if shot.when else ""
    return f"<title>micro-batch {shot.micro_batch} {way}{chunk}{when}</title>"


def _fold(fold: Fold, floor: int) -> str:
    title = f"<title>{words.plural(fold.skipped, 'micro-batch')} more, alike</title>"
    start, width, middle = _percent(fold.start), _percent(fold.end - fold.start), _percent((fold.start + fold.end) / 2)
    return (
        f'<rect class="fold" x="{start}" y="-1" width="{width}" height="{floor + 2}">{title}</rect>'
        f'<text class="more" x="{middle}" y="{floor + 17}">{words.count(fold.skipped)} more</text>'
    )


def _axis(film: Film, floor: int) -> Iterator[str]:
    last = -1.0
    for place, seconds in film.ticks:
        taken = any(fold.start - 0.025 < place < fold.end + 0.025 for fold in film.folds)
        if taken or place - last < 0.05 or place > 0.985:
            continue
        last = place
        anchor = ' style="text-anchor:start"' if place < 0.01 else ""
        yield f'<line class="tick" x1="{_percent(place)}" x2="{_percent(place)}" y1="{floor}" y2="{floor + 4}"/>'
        yield f'<text class="tick" x="{_percent(place)}" y="{floor + 17}"{anchor}>{words.seconds(seconds)}</text>'


def _percent(share: float) -> str:
    return f"{share * 100:.3f}".rstrip("0").rstrip(".") + "%"
