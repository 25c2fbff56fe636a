"""What a layer may do, priced: a `Column` for the whole step, an `Option` as one stage sees it, and the cheapest mix of them.

A stage with `q` micro-batches in flight, in a step of `M` slots, sees of a column the seconds `t + d / M` and the bytes
`states + q kept`. Its layers may mix options; with the whole numbers left out, the fastest mix within some bytes runs along the
lower convex hull of the options' (bytes, seconds), and over several groups the steepest edge of any hull is worth the next
byte (`relaxed_seconds`). Nothing is faster: it is the linear program of `search.ilp` with the largest moment taken at its
smallest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple

from autoplan.cost.step import LayerStep
from autoplan.strategy import Strategy
from autoplan.units import Bytes, Seconds


@dataclass(frozen=True)
class Column:
    """One strategy of one class of layers, priced for a whole step."""

    strategy: Strategy
    step: LayerStep

    @cached_property
    def costs(self) -> tuple[float, ...]:
        """Everything that could make another strategy preferable."""
        step = self.step
        return step.slot_seconds, step.once_seconds, step.state_bytes, step.kept, step.peak


class Option(NamedTuple):
    """A column on a stage: seconds of one slot, bytes, bytes while its backward pass runs."""

    seconds: Seconds
    bytes: Bytes
    peak: Bytes
    column: Column


class Vertex(NamedTuple):
    """A corner of the hull."""

    bytes: Bytes
    seconds: Seconds


def _bytes(vertex: Vertex) -> Bytes:
    return vertex.bytes


class Options(tuple[Option, ...]):
    """The unbeaten options of a layer on a stage, the fastest first, with what bounds their mixes."""

    hull: tuple[Vertex, ...]
    peak: Bytes
    """The smallest."""

    def at(self, size: Bytes) -> Seconds:
        """Seconds of the fastest mix that takes `size` bytes a layer; infinite when none does."""
        hull = self.hull
        if size >= hull[-1].bytes:
            return hull[-1].seconds
        if size < hull[0].bytes:
            return inf
        i = bisect_right(hull, size, key=_bytes)
        a, b = hull[i - 1], hull[i]
        return a.seconds + (b.seconds - a.seconds) * (size - a.bytes) / (b.bytes - a.bytes)

    @staticmethod
    def of(columns: Iterable[Column], slots: float, in_flight: int) -> Options:
        """Of all columns of a layer, on a stage with so many micro-batches in flight."""
        found = Options(_unbeaten([Option(c.step.seconds(slots), c.step.bytes(in_flight), c.step.peak, c) for c in columns]))
        found.hull = tuple(_hull(found))
        found.peak = min(option.peak for option in found)
        return found


class Group(NamedTuple):
    """`number` equal layers of a stage: of a body (or the outer part), in a chunk, or in others with as many micro-batches in
    flight."""

    body: int
    chunk: int
    number: int
    options: Options

    @property
    def fastest(self) -> Option:
        return self.options[0]


def unbeaten_columns(columns: Sequence[Column]) -> list[Column]:
    """Columns that no other column equals or beats in every cost, the fastest first."""
    kept: list[Column] = []
    for column in sorted(columns, key=lambda c: c.costs):
        if not any(all(a <= b for a, b in zip(other.costs, column.costs, strict=True)) for other in kept):
            kept.append(column)
    return kept


def _unbeaten(options: list[Option]) -> list[Option]:
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: o[:3]):
        if not any(o.bytes <= option.bytes and o.peak <= option.peak for o in kept):
            kept.append(option)
    return kept


def _hull(options: Sequence[Option]) -> list[Vertex]:
    """From the leanest option to the fastest, only corners of the lower convex hull."""
    corners: list[Vertex] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.seconds)):
        point = Vertex(option.bytes, option.seconds)
        if corners and point.seconds >= corners[-1].seconds:
            continue
        while len(corners) > 1 and _above(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def _above(a: Vertex, b: Vertex, c: Vertex) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b.seconds - a.seconds) * (c.bytes - a.bytes) >= (c.seconds - a.seconds) * (b.bytes - a.bytes)


def least_bytes(groups: Sequence[Group]) -> Bytes:
    """No choice of options needs less."""
    return sum(group.number * group.options.hull[0].bytes for group in groups) + max(group.options.peak for group in groups)


def least_seconds(groups: Sequence[Group]) -> Seconds:
    """No choice of options is faster, whatever memory it takes."""
    return sum(group.number * group.fastest.seconds for group in groups)


def relaxed_seconds(groups: Sequence[Group], limit: Bytes) -> Seconds:
    """No choice of options that fits into `limit` bytes is faster; infinite when none fits."""
    spare = limit - least_bytes(groups)
    if spare < 0:
        return inf
    seconds = sum(group.number * group.options.hull[0].seconds for group in groups)
    edges = [
        ((b.seconds - a.seconds) / (b.bytes - a.bytes), group.number * (b.bytes - a.bytes))
        for group in groups
        for a, b in zip(group.options.hull, group.options.hull[1:], strict=False)
    ]
    for slope, size in sorted(edges):
        taken = min(size, spare)
        seconds += slope * taken
        spare -= taken
        if spare <= 0:
            break
    return seconds
