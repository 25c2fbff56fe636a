"""Bounds on what the layers of a stage take together, whatever options they use.

With the whole numbers left out, the steepest edge of any group's hull is worth the next byte (`relaxed_seconds`). Nothing is
faster: it is the linear program of `search.ilp` with the largest moment taken at its smallest (`search.options`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import inf
from typing import NamedTuple

from autoplan.search.options import Group, Options
from autoplan.units import Bytes, Seconds

STEPS = 4
"""Of Newton's."""


class Ranks(NamedTuple):
    """`number` equal ranks of a pipeline whose layers are all alike, with `beside` seconds and a `peak` of what else is there."""

    number: int
    options: Options
    room: Bytes
    peak: Bytes
    beside: Seconds


def least_bytes(groups: Sequence[Group]) -> Bytes:
    """No choice of options needs less."""
    return max(_at_once(groups), _afterwards(groups))


def fits(groups: Sequence[Group], limit: Bytes) -> bool:
    """Whether `least_bytes` is within the limit."""
    return least_bytes(groups) <= limit


def _at_once(groups: Sequence[Group]) -> Bytes:
    return sum(group.number * group.options.bytes for group in groups) + max(group.options.tail for group in groups)


def _afterwards(groups: Sequence[Group]) -> Bytes:
    return sum(group.number * group.options.left for group in groups) + max(group.options.ending for group in groups)


def least_seconds(groups: Sequence[Group]) -> Seconds:
    """No choice of options is faster, whatever memory it takes."""
    return sum(group.number * group.fastest.seconds for group in groups)


def relaxed_seconds(groups: Sequence[Group], limit: Bytes) -> Seconds:
    """No choice of options that fits into `limit` bytes is faster; infinite when none fits."""
    if not fits(groups, limit):
        return inf
    leanest = sum(group.number * group.options.hull[0].bytes for group in groups)
    spare = max(0.0, limit - leanest - max(group.options.peak for group in groups))
    seconds = sum(group.number * group.options.hull[0].seconds for group in groups)
    edges = [
        ((b.seconds - a.seconds) / (b.bytes - a.bytes), group.number * (b.bytes - a.bytes))
        for group in groups
        for a, b in pairwise(group.options.hull)
    ]
    for slope, size in sorted(edges):
        taken = min(size, spare)
        seconds += slope * taken
        spare -= taken
        if spare <= 0:
            break
    return seconds


def level(ranks: Sequence[Ranks], layers: int, low: Seconds) -> Seconds:
    """No slot of the slowest rank is shorter if all ranks together have so many layers, parts of layers too; infinite when there
    is no room for them. `low` must be a bound already.

    What they have together grows ever more slowly with the seconds, so that Newton's steps from below never pass the end.
    """
    for _ in range(STEPS):
        placed = more = 0.0
        for rank in ranks:
            number, grows = rank.options.part(rank.room, rank.peak, low - rank.beside)
            placed, more = placed + rank.number * max(number, 0.0), more + rank.number * grows
        if placed >= layers * (1 - 1e-9):
            break
        if not more:
            return inf
        low += (layers - placed) / more
    return low * (1 - 1e-9)
