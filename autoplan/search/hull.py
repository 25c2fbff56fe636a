"""The lower convex hull of points (bytes, seconds): the fastest mix of two of them within some bytes lies on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf
from typing import NamedTuple

import numpy as np

from autoplan.search.dominance import Bools, Floats
from autoplan.units import Bytes, Seconds


class Vertex(NamedTuple):
    """A corner of the hull."""

    bytes: Bytes
    seconds: Seconds


def records(numbers: Floats) -> Bools:
    """Which are less than all before them. (`np.diff` with `prepend` is ten times slower.)"""
    least = np.minimum.accumulate(numbers)
    found = np.ones(len(numbers), dtype=bool)
    np.less(least[1:], least[:-1], out=found[1:])
    return found


def falling(pairs: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Those whose second number is less than those of all before."""
    least = inf
    for pair in pairs:
        if pair[1] < least:
            least = pair[1]
            yield pair


def lower(points: Iterable[tuple[Bytes, Seconds]]) -> list[Vertex]:
    """The hull's corners, of points that take more and more bytes and fewer and fewer seconds."""
    corners: list[tuple[Bytes, Seconds]] = []
    for point in points:
        while len(corners) > 1 and _above(*corners[-2], *corners[-1], *point):
            corners.pop()
        corners.append(point)
    return list(map(Vertex._make, corners))


def _above(x0: Bytes, y0: Seconds, x1: Bytes, y1: Seconds, x2: Bytes, y2: Seconds) -> bool:
    """Whether the second point lies on or above the line from the first to the third."""
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)
