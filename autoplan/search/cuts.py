"""Where to cut a row of layers into stages, when a stage's price is known for every run of layers.

`value(s, i, j)` is the price of stage `s` with the layers `i ... j - 1`; it grows with the run. Two questions:

    least_bottleneck    a bound on the largest price of a stage: stages take as many layers as they can within t, one after
                        another (`farthest`), so whether a t may be kept is seen at once; t is found by bisection
    best_cut            the cut with the least  many max_s value + few sum_s value: labels (largest, sum) of partial cuts,
                        of which only the unbeaten ones at each layer go on; exact. Where each stage can end is narrowed
                        first: a cut that can be had (the first question's) says what no stage of a better one may cost
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from math import inf, isinf
from typing import NamedTuple

Value = Callable[[int, int, int], float]

_NEAR = 1e-5
"""How near `least_bottleneck` comes."""
_ROUNDING = 1 + 1e-12


def farthest(stages: int, layers: int, value: Value, most: float, least: int = 1) -> int:
    """How many layers can be placed on all stages, each of at least `least` layers and a price of at most `most`; at best:
    a stage that cannot take even `least` layers from where its predecessor may end looks for an earlier start."""

    def fits(s: int, i: int, j: int) -> bool:
        price = value(s, i, j)
        return price <= most and price < inf

    at = 0
    for s in range(stages):
        start, last = at, layers - least * (stages - s - 1)
        while start >= s * least and not (start + least <= last and fits(s, start, start + least)):
            start -= 1
        if start < s * least:
            return at
        low, high = start + least, last
        while low < high:
            middle = (low + high + 1) // 2
            if fits(s, start, middle):
                low = middle
            else:
                high = middle - 1
        at = low
    return at


def least_bottleneck(stages: int, layers: int, value: Value, low: float, high: float, least: int = 1) -> float:
    """A lower bound within `_NEAR` on the largest price of a stage in any cut; infinite when not even `high` can be kept, or
    when not even at best (`farthest`) there is a cut without a run of infinite price.

    `low` must be a bound already.
    """
    if farthest(stages, layers, value, high, least) < layers:
        return inf
    if farthest(stages, layers, value, low, least) >= layers:
        return low
    if isinf(high):
        high = max(2 * low, 1e-9)
        while farthest(stages, layers, value, high, least) < layers:
            low, high = high, 2 * high
    while high - low > _NEAR * high:
        middle = (low + high) / 2
        if farthest(stages, layers, value, middle, least) >= layers:
            high = middle
        else:
            low = middle
    return low


def at_least(wanted: int, number: Callable[[int], int], last: int) -> bool:
    """Whether number(1) + ... + number(last) is as much; of a number that never falls, asked no more often than that needs."""
    runs = [(1, last)]
    while True:
        if sum(number(first) * (end - first + 1) for first, end in runs) >= wanted:
            return True
        if sum(number(end) * (end - first + 1) for first, end in runs) < wanted:
            return False
        first, end = max(runs, key=lambda run: (number(run[1]) - number(run[0])) * (run[1] - run[0]))
        runs.remove((first, end))
        # the ends of a run are known, so that a run of two is two known ones
        middle = (first + end) // 2
        runs += [(first, middle), (middle + 1, end)]


@lru_cache(maxsize=65536)
def chunk_sizes(layers: int, beside: tuple[float, ...]) -> tuple[int, ...]:
    """Layers of every chunk of a rank, with what is `beside` them in each, counted in layers: at least one, and as even as they
    go. For the ranks pass a chunk on together: one that takes long makes all of them wait, whatever their others take. Of equal
    chunks the last takes more: fewest micro-batches of it are in flight."""
    chunks = len(beside)
    sizes = [int(chunk >= chunks - layers) for chunk in range(chunks)]
    for _ in range(layers - chunks):
        sizes[min(range(chunks), key=lambda chunk: (sizes[chunk] + beside[chunk], -chunk))] += 1
    return tuple(sizes)


class _Label(NamedTuple):
    largest: float
    total: float
    at: int
    before: _Label | None


class BestCut(NamedTuple):
    """`edges`: where each stage ends; `cost`: many max + few sum."""

    cost: float
    edges: tuple[int, ...]


def best_cut(
    stages: int,
    layers: int,
    value: Value,
    many: float,
    few: float,
    least: int = 1,
    most: float = inf,
    total: float = 0.0,
) -> BestCut | None:
    """The cheapest cut, or None when there is none with a cost of at most `most`; `total` bounds sum_s value from below."""
    if isinf(most):
        most = _attainable(stages, layers, value, many, few, least, total) * _ROUNDING
    cap = (most - few * total) / many * _ROUNDING if many > 0 else inf
    starts, ends = _earliest(stages, layers, value, cap, least), _latest(stages, layers, value, cap, least)
    cells: dict[int, list[_Label]] = {0: [_Label(0.0, 0.0, 0, None)]}
    for s in range(stages):
        found: dict[int, list[_Label]] = {}
        for at, labels in cells.items():
            for end in range(max(at + least, starts[s + 1]), ends[s + 1] + 1):
                price = value(s, at, end)
                if price > cap or isinf(price):
                    break
                for label in labels:
                    new = _Label(max(label.largest, price), label.total + price, end, label)
                    if many * new.largest + few * new.total <= most:
                        found.setdefault(end, []).append(new)
        cells = {end: _unbeaten(labels) for end, labels in found.items()}
    if layers not in cells:
        return None
    best = min(cells[layers], key=lambda label: many * label.largest + few * label.total)
    return BestCut(many * best.largest + few * best.total, _edges(best))


def _attainable(stages: int, layers: int, value: Value, many: float, few: float, least: int, total: float) -> float:
    """The cost of a cut with nearly the least bottleneck, every stage filled in turn; infinite when that is no cut."""
    slowest = least_bottleneck(stages, layers, value, total / stages, inf, least)
    if isinf(slowest):
        return inf
    edges = _latest(stages, layers, value, slowest * (1 + 2 * _NEAR), least)
    prices = [value(s, i, j) if j - i >= least else inf for s, (i, j) in enumerate(pairwise(edges))]
    return many * max(prices) + few * sum(prices) if edges[-1] == layers else inf


def _latest(stages: int, layers: int, value: Value, cap: float, least: int) -> list[int]:
    """No stage ends after these (the first entry: before stage 0) when none may cost more than `cap`."""
    ends = [0]
    for s in range(stages):
        start, last = ends[-1], layers - least * (stages - s - 1)
        low, high = min(start + least - 1, last), last
        while low < high:
            middle = (low + high + 1) // 2
            if value(s, start, middle) <= cap:
                low = middle
            else:
                high = middle - 1
        ends.append(low)
    return ends


def _earliest(stages: int, layers: int, value: Value, cap: float, least: int) -> list[int]:
    """No stage starts before these (the last entry: after the last stage), likewise."""
    starts = [layers]
    for s in reversed(range(stages)):
        end, first = starts[-1], least * s
        low, high = first, max(end - least + 1, first)
        while low < high:
            middle = (low + high) // 2
            if value(s, middle, end) <= cap:
                high = middle
            else:
                low = middle + 1
        starts.append(low)
    return starts[::-1]


def _unbeaten(labels: list[_Label]) -> list[_Label]:
    kept: list[_Label] = []
    for label in sorted(labels, key=lambda each: each[:2]):
        if not kept or label.total < kept[-1].total:
            kept.append(label)
    return kept


def _edges(label: _Label) -> tuple[int, ...]:
    edges = []
    at: _Label | None = label
    while at is not None and at.before is not None:
        edges.append(at.at)
        at = at.before
    return tuple(reversed(edges))
