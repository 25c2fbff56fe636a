"""What a layer may do, priced: a `Column` for the whole step, an `Option` as one stage sees it, and the fastest mix of them.

A stage with `q` micro-batches in flight, in a step of `M` slots, sees of a column the seconds `t + d / M` and the bytes
`states + q kept`. Its layers may mix options; with the whole numbers left out, the fastest mix within some bytes runs along the
lower convex hull of the options' (bytes, seconds) (`Options.at`).

All bounds take the moment of one layer alone, its own window with it (`Option.peak`): of that whose backward pass runs last of
its group, which nobody frees anything for. So `n` layers need at least `n` times the fewest bytes of any option, and
`Options.tail` besides: the fewest bytes with `peak`, less the fewest bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil, floor, inf
from operator import attrgetter
from typing import Any, NamedTuple, overload

import numpy as np

from autoplan.cost.step import LayerStep
from autoplan.search.dominance import Floats, unbeaten
from autoplan.search.hull import Vertex, falling, lower, records
from autoplan.strategy import Recompute, Sharding, Strategy, Zero
from autoplan.units import Bytes, Seconds

_BYTES = attrgetter("bytes")
_FEW = 6
"""Columns that are looked at one by one."""
STEP = 2.0**18
"""A quarter of a mebibyte: see `level`."""
_ANY = 2**31
"""Layers that cost nothing: as many as anyone wants."""


class Costs(NamedTuple):
    """Everything that could make another strategy preferable. See `LayerStep`."""

    slot_seconds: Seconds
    once_seconds: Seconds
    state_bytes: Bytes
    kept: Bytes
    left_bytes: Bytes
    alone: Bytes
    ending: Bytes
    inside: Bytes
    window: Bytes
    reducing: Bytes
    buffer: Bytes

    @staticmethod
    def of(step: LayerStep) -> Costs:
        """What matters of a price."""
        return Costs._make(getattr(step, name) for name in Costs._fields)

    def columns(self, number: int) -> Floats:
        """Of so many columns as one array; a number here is of all of them, or an array."""
        return _array(self, number)


@dataclass(frozen=True)
class Column:
    """One strategy of one class of layers, and what it costs in a whole step. The search prices all shardings at once and
    most of them never matter: strategy and full price are written when they are asked for."""

    costs: Costs
    recompute: Recompute
    zero: Zero
    sharding: Callable[[], Sharding]
    price: Callable[[Strategy], LayerStep]

    @staticmethod
    def of(strategy: Strategy, step: LayerStep) -> Column:
        """A strategy whose price is known."""
        return Column(Costs.of(step), strategy.recompute, strategy.zero, lambda: strategy.sharding, lambda _: step)

    @cached_property
    def strategy(self) -> Strategy:
        return Strategy(self.sharding(), self.recompute, self.zero)

    @cached_property
    def step(self) -> LayerStep:
        return self.price(self.strategy)


class Columns(Sequence[Column]):
    """All columns of a class of layers, and what stages see of them. `costs`: `Column.costs` as an array, one column each; most
    columns are never asked for, and made when they are."""

    def __init__(self, costs: Floats, make: Callable[[int], Column]) -> None:
        self.costs, self._make = costs, make
        self._made: dict[int, Column] = {}

    @staticmethod
    def of(columns: Sequence[Column]) -> Columns:
        """Of some that are made."""
        return Columns(np.array([column.costs for column in columns]).reshape(-1, len(Costs._fields)).T, columns.__getitem__)

    def __len__(self) -> int:
        return int(self.costs.shape[1])

    @overload
    def __getitem__(self, index: int) -> Column: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Column]: ...
    def __getitem__(self, index: int | slice) -> Column | Sequence[Column]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index not in self._made:
            self._made[index] = self._make(index)
        return self._made[index]

    def seen(self, slots: float, in_flight: int) -> Options:
        """On a stage with so many micro-batches in flight, in a step of `slots`."""
        if (slots, in_flight) not in self._seen:
            self._seen[slots, in_flight] = Options.of(self, slots, in_flight)
        return self._seen[slots, in_flight]

    @cached_property
    def _seen(self) -> dict[tuple[float, int], Options]:
        return {}


class Option(NamedTuple):
    """A column on a stage: seconds of one slot, bytes, and bytes when its backward pass has run; the rest as in `LayerStep`."""

    seconds: Seconds
    bytes: Bytes
    alone: Bytes
    left: Bytes
    ending: Bytes
    inside: Bytes
    window: Bytes
    reducing: Bytes
    buffer: Bytes
    column: Column

    @property
    def goes(self) -> Bytes:
        """What is gone then."""
        return self.bytes - self.left

    @property
    def peak(self) -> Bytes:
        """What it holds besides in its moment, with a neighbour like itself."""
        return self.alone + self.inside + self.window + self.reducing


def level(size: Bytes) -> Bytes:
    """What counts only as the largest, in the steps in which the program knows it (`search.program`)."""
    return ceil(size / STEP) * STEP


def precedence(costs: Costs | Option, paired: bool) -> tuple[Bytes, Bytes, Bytes, Bytes, Bytes]:
    """Layers with more of this run earlier forward (`search.ilp`); `paired`: what is reduced beside one is of a layer that is
    known. Below the steps it settles what no program decides."""
    own = costs.inside + (costs.reducing if paired else 0.0)
    return level(own), level(costs.inside), own, costs.inside, costs.buffer


def _on_stage(costs: Iterable[Any], slots: float, in_flight: int) -> tuple[Any, ...]:
    """The numbers of an `Option`, from those of `Costs`: of one column, or of all as arrays."""
    slot, once, state, kept, left, alone, *rest = costs
    return slot + once / slots, state + in_flight * kept, alone, left + (in_flight - 1) * kept, *rest


def _array(rows: Sequence[Any], number: int) -> Floats:
    """Rows of so many numbers each, or of one that stands for all. (`np.stack` and `np.broadcast_to` take longer.)"""
    found = np.empty((len(rows), number))
    for i, row in enumerate(rows):
        found[i] = row
    return found


class Options(Sequence[Option]):
    """The unbeaten options of a layer on a stage, the fastest first, with what bounds their mixes."""

    def __init__(self, columns: Sequence[Column], costs: Floats) -> None:
        self._columns, self._costs = columns, costs
        peak = costs[2] + costs[5] + costs[6] + costs[7]
        self.peak: Bytes = float(peak.min())
        """The smallest, as those below."""
        self.bytes: Bytes = float(costs[1].min())
        self.left: Bytes = float(costs[3].min())
        self.ending: Bytes = float(costs[4].min())
        self.tail: Bytes = float((costs[1] + peak).min()) - self.bytes
        """Besides the fewest bytes of every layer: see the module."""

    @staticmethod
    def of(columns: Sequence[Column], slots: float, in_flight: int) -> Options:
        """Of all columns of a layer, on a stage with so many micro-batches in flight."""
        if len(columns) <= _FEW:
            return FewOptions([Option._make((*_on_stage(column.costs, slots, in_flight), column)) for column in columns])
        costs = columns.costs if isinstance(columns, Columns) else np.array([column.costs for column in columns]).T
        return Options(columns, _array(_on_stage(costs, slots, in_flight), len(columns)))

    @cached_property
    def _options(self) -> list[Option]:
        kept = unbeaten(self._costs)
        numbers = self._costs[:, kept].T.tolist()
        columns = [self._columns[i] for i in kept.tolist()]
        return [Option._make((*costs, column)) for costs, column in zip(numbers, columns, strict=True)]

    def __len__(self) -> int:
        return len(self._options)

    @overload
    def __getitem__(self, index: int) -> Option: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Option]: ...
    def __getitem__(self, index: int | slice) -> Option | Sequence[Option]:
        return self._options[index]

    @cached_property
    def hull(self) -> tuple[Vertex, ...]:
        """From the leanest mix to the fastest."""
        order = np.lexsort((self._costs[0], self._costs[1]))
        seconds = self._costs[0][order]
        faster = records(seconds)
        return tuple(lower(zip(self._costs[1][order][faster].tolist(), seconds[faster].tolist(), strict=True)))

    def fit(self, number: int, limit: Bytes, peak: Bytes) -> bool:
        """Whether so many layers can be within the limit: `bounds.fits`, of one group beside something with such a peak."""
        return number * self.left + self.ending <= limit and number * self.bytes + max(self.tail, peak) <= limit

    def most(self, limit: Bytes, peak: Bytes, seconds: Seconds) -> int:
        """How many layers fit at most, and are within some seconds as well in the fastest mix that fits: those numbers for which
        `fit(number, limit, peak)` and `number at((limit - max(peak, self.peak)) / number) <= seconds`."""
        found, _ = self.part(limit, peak, seconds)
        return floor(found * (1 + 1e-12) + 1e-9) if found < inf else _ANY

    def part(self, limit: Bytes, peak: Bytes, seconds: Seconds) -> tuple[float, float]:
        """`most` with parts of layers, and how many more a second more would bring: ever fewer."""
        room = limit - max(peak, self.peak)
        beside = limit - max(self.tail, peak)
        found = beside / self.bytes if self.bytes else inf if beside >= 0 else 0.0
        if self.left:
            found = min(found, (limit - self.ending) / self.left)
        elif self.ending > limit:
            return 0.0, 0.0
        more = 0.0
        for slope, level in self.edges:
            if level > 0 and seconds - slope * room < found * level:
                found, more = (seconds - slope * room) / level, 1 / level
        return found, more

    @cached_property
    def edges(self) -> list[tuple[float, Seconds]]:
        """Of n layers in `room` bytes the fastest mix takes the most of  level n + slope room  over these."""
        hull = self.hull
        slopes = [(b.seconds - a.seconds) / (b.bytes - a.bytes) for a, b in pairwise(hull)]
        edges = [(slope, a.seconds - slope * a.bytes) for slope, a in zip(slopes, hull, strict=False)]
        return [*edges, (0.0, hull[-1].seconds)]

    def least(self, price: float) -> Seconds:
        """Of one layer at least, where a byte has a price in seconds."""
        return min(corner.seconds + price * corner.bytes for corner in self.hull)

    def at(self, size: Bytes) -> Seconds:
        """Seconds of the fastest mix that takes `size` bytes a layer; infinite when none does."""
        hull = self.hull
        if size >= hull[-1].bytes:
            return hull[-1].seconds
        if size < hull[0].bytes:
            return inf
        i = bisect_right(hull, size, key=_BYTES)
        a, b = hull[i - 1], hull[i]
        return a.seconds + (b.seconds - a.seconds) * (size - a.bytes) / (b.bytes - a.bytes)


class FewOptions(Options):
    """The same in plain numbers: of so few an array costs more than it saves."""

    def __init__(self, options: Sequence[Option]) -> None:
        self._all = options
        self.peak = min(option.peak for option in options)
        self.bytes = min(option.bytes for option in options)
        self.left = min(option.left for option in options)
        self.ending = min(option.ending for option in options)
        self.tail = min(option.bytes + option.peak for option in options) - self.bytes

    @cached_property
    def _options(self) -> list[Option]:
        kept: list[Option] = []
        for option in sorted(self._all, key=lambda each: each[:-1]):
            if not any(all(a <= b for a, b in zip(other[:-1], option[:-1], strict=True)) for other in kept):
                kept.append(option)
        return kept

    @cached_property
    def hull(self) -> tuple[Vertex, ...]:
        return tuple(lower(falling(sorted((option.bytes, option.seconds) for option in self._all))))


class Group(NamedTuple):
    """`number` equal layers of a stage: of a body (or the outer part), in a chunk, or in others with as many micro-batches in
    flight."""

    body: int
    chunk: int
    number: int
    options: Options
    frees: bool = True
    """Whether layers that run their backward pass before others free what they kept for them: all are in one chunk."""

    @property
    def fastest(self) -> Option:
        return self.options[0]
