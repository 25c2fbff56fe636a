"""One mesh, micro-batch, schedule and outer strategy: the best cut into stages and strategy of every layer, with its bounds.

A stage's price is a number for every run of layers that it may take: its least seconds `u(s, i, j)` under its memory. It is
known from below by the relaxed mix of options (`search.bounds`) and exactly by the integer program (`search.ilp`). The step
is `many max_s u + few sum_s u + hops` (cost.model), so that the best cut is found on those numbers alone (`search.cuts`):
first on bounds; then the runs that the best cut uses are solved exactly, and again, until the best cut uses solved runs only
(`Staging.solve`). No other cut is better, since every number that was not solved is a bound.

With several chunks a rank, all layers must be of one body: a rank deals its layers evenly to its chunks, with what these have of
the outer body counted as layers (`cuts.chunk_sizes`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import inf

from autoplan.cost.model import OUTER, Cut
from autoplan.schedule import ScheduleKind, in_flight_by_chunk, slots
from autoplan.search.bounds import Ranks, fits, least_bytes, level, relaxed_seconds
from autoplan.search.columns import Outer, Priced, Tables
from autoplan.search.cuts import Value, at_least, best_cut, chunk_sizes, farthest, least_bottleneck
from autoplan.search.dominance import Floats
from autoplan.search.ilp import Choice, choose, memory
from autoplan.search.options import Column, Group, Options
from autoplan.strategy import Strategy
from autoplan.units import Bytes, Seconds

RUNS = 3
"""Of inner ranks that a first bound looks at."""

Assignment = dict[int, list[tuple[Column, int]]]
"""Body -> its columns with the number of layers that use each."""


@dataclass(frozen=True)
class Solution:
    """The best of one staging."""

    outer: Strategy
    cut: Cut
    stages: tuple[Assignment, ...]
    """By virtual stage."""
    seconds: Seconds
    bound: Seconds
    """No cut and no strategies of this staging are faster."""
    memory: Bytes


class Staging:
    """See the module. `outer` is None without a pipeline, where OUTER is a group of layers like any other."""

    def __init__(
        self, tables: Tables, priced: Priced, outer: Outer | None, schedule: ScheduleKind, chunks: int, limit: Bytes
    ) -> None:
        self.tables, self.priced, self.outer, self.schedule, self.chunks = tables, priced, outer, schedule, chunks
        costs, mesh = tables.costs, priced.mesh
        self.limit, self.ranks = limit, mesh.pp
        self.micro_batches = costs.micro_batches(mesh, priced.micro_batch)
        self.few = costs.share(schedule, chunks, mesh, priced.micro_batch)
        self.many, self.slots = self.micro_batches - self.few, slots(self.micro_batches, mesh.pp, self.few)
        self.hops = costs.hops(schedule, chunks, mesh, priced.micro_batch, priced.stream)
        self.passing = costs.passing(mesh, priced.micro_batch, priced.stream, Cut(schedule, chunks))
        self.limits = [limit - size for size in self.passing]
        self.layers = len(tables.graph.blocks)
        self.least = self.chunks if self.layers else 0  # a model may have no layer that repeats
        self._groups: dict[Hashable, list[Group]] = {}
        self._relaxed: dict[Hashable, Seconds] = {}
        self._outer_stages: dict[int, tuple[Seconds, Bytes, Bytes]] = {}
        self._exact: dict[Hashable, Choice | None] = {}
        self._shared = priced.solved.setdefault((schedule, chunks, limit), {})

    @cached_property
    def settled(self) -> list[Staging]:
        """One of every outer strategy where it is `Priced.best_outer`."""
        priced = self.priced
        if len(priced.outers) < 2 or self.outer in priced.outers:
            return [self]
        return [Staging(self.tables, priced, outer, self.schedule, self.chunks, self.limit) for outer in priced.outers]

    @cached_property
    def _alike(self) -> bool:
        """Whether a run's price depends on the stage and the run's length alone."""
        return len(self.tables.counts) == 1 and set(self.tables.costs.outer.busy) <= {0, self.layers}

    def _key(self, s: int, i: int, j: int) -> Hashable:
        return (s, j - i) if self._alike or self.chunks > 1 else (s, self.tables.stretch(i, j))

    def _parts(self, s: int, i: int, j: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(chunk, busy regions of the outer body) of a stage."""
        outer = self.tables.costs.outer
        if self.chunks == 1:
            return ((0, outer.within(i, j)),) if outer.within(i, j) else ()
        first = [(0, outer.within(0, 1))] if s == 0 else []
        last = [(self.chunks - 1, outer.within(self.layers - 1, self.layers))] if s == self.ranks - 1 else []
        return tuple(part for part in (*first, *last) if part[1])

    def groups(self, s: int, i: int, j: int) -> list[Group]:
        """What stage `s` holds when it has the layers i ... j - 1 (with several chunks: j - i layers)."""
        key = self._key(s, i, j)
        if key not in self._groups:
            flight = self.flight(s)
            found = []
            for g, counts in self.tables.counts.items():
                number = counts[j] - counts[i]
                alike: dict[int, int] = {}  # layers of chunks with as many micro-batches in flight are interchangeable
                for chunk, size in enumerate(chunk_sizes(number, self.loads[s])):
                    alike[flight[chunk]] = alike.get(flight[chunk], 0) + size
                found += [
                    Group(g, flight.index(held), size, self._layer_options(g, held), frees=self.chunks == 1)
                    for held, size in alike.items()
                    if size
                ]
            if self.outer is None:
                found.append(Group(OUTER, 0, 1, self._layer_options(OUTER, flight[0])))
            else:
                for chunk, regions in self._parts(s, i, j):
                    column = Column.of(self.outer.strategy, self.outer.parts[regions])
                    found.append(Group(OUTER, chunk, 1, Options.of([column], self.slots, flight[chunk])))
            self._groups[key] = found
        return self._groups[key]

    @cached_property
    def loads(self) -> list[tuple[float, ...]]:
        """What every chunk of every rank has of the outer body, in layers that take as long; alike for all outer strategies."""
        loads, outer = [[0.0] * self.chunks for _ in range(self.ranks)], self.priced.best_outer
        if self.chunks > 1 and outer is not None:
            (g,) = self.tables.counts
            layer = self._layer_options(g, 1).hull[-1].seconds
            for s in (0, self.ranks - 1):
                for chunk, regions in self._parts(s, 0, 0):
                    loads[s][chunk] = outer.parts[regions].seconds(self.slots) / layer
        return [tuple(each) for each in loads]

    def flight(self, s: int) -> tuple[int, ...]:
        """Micro-batches in flight in every chunk of rank `s`."""
        return in_flight_by_chunk(self.schedule, s, self.ranks, self.micro_batches, self.chunks)

    def _layer_options(self, g: int, in_flight: int) -> Options:
        return self.priced.columns[g].seen(self.slots, in_flight)

    def relaxed(self, s: int, i: int, j: int) -> Seconds:
        """No strategies of these layers are faster on this stage under its memory; infinite when none fits."""
        key = self._key(s, i, j)
        if key not in self._relaxed:
            if self._alike and self.chunks == 1 and self.ranks > 1:
                self._relaxed[key] = self._quick(s, i, j)  # then the bound is the relaxed price itself
            else:
                self._relaxed[key] = relaxed_seconds(self.groups(s, i, j), self.limits[s])
        return self._relaxed[key]

    def _outer_at(self, s: int) -> tuple[Seconds, Bytes, Bytes]:
        """Seconds, bytes and largest moment of what a stage has of the outer body, when it depends on the stage alone."""
        if s not in self._outer_stages:
            first = 0 if s == 0 else self.layers - 1 if s == self.ranks - 1 else 1
            last = self.layers if s == self.ranks - 1 else first + 1
            steps = [self.outer.parts[regions] for _, regions in self._parts(s, first, last)] if self.outer else []
            flight = min(self.flight(s))
            self._outer_stages[s] = (
                sum(step.seconds(self.slots) for step in steps),
                sum(step.bytes(flight) for step in steps),
                max((step.alone for step in steps), default=0.0),
            )
        return self._outer_stages[s]

    def _excess(self, s: int, i: int, j: int) -> Bytes:
        return least_bytes(self.groups(s, i, j)) - self.limits[s]

    @cached_property
    def fastest(self) -> Seconds:
        """Seconds of one slot of all layers at their fastest strategies, memory ignored."""
        least = self._of_all(lambda costs: costs[0] + costs[1] / self.slots)
        return least + (self._fastest_outer(self.outer) if self.outer else 0.0)

    def _fastest_outer(self, outer: Outer) -> Seconds:
        """The cheapest way to cut the busy regions into runs."""
        busy = self.tables.costs.outer.busy
        least = [0.0]
        for j in range(1, len(busy) + 1):
            least.append(min(least[i] + outer.parts[busy[i:j]].seconds(self.slots) for i in range(j)))
        return least[-1]

    @cached_property
    def quick_bound(self) -> Seconds:
        """A bound on the step that costs nothing: memory ignored, layers spread as if they could be divided."""
        return self.many * self.fastest / self.ranks + self.few * self.fastest + self.hops

    @cached_property
    def early_bound(self) -> Seconds:
        """A bound on the step with memory in it that costs little; infinite only when nothing fits."""
        if self.ranks == 1:
            return self.bound()
        slowest = self._level() if self._alike else 0.0
        return self._no_sooner(slowest)

    def _no_sooner(self, slowest: Seconds) -> Seconds:
        """A bound on the step, from one on its slowest stage."""
        return max(self.quick_bound, self.many * slowest + self.few * self.fastest + self.hops)

    def _level(self) -> Seconds:
        """No rank's slot can be shorter: `bounds.level`, of inner ranks in some runs as of the last in each, which has the fewest
        micro-batches in flight."""
        (g,) = self.tables.counts
        inner = range(1, self.ranks - 1)
        runs = [inner[i * len(inner) // RUNS : (i + 1) * len(inner) // RUNS] for i in range(RUNS)]
        found = []
        for s, alike in [(0, 1), (self.ranks - 1, 1), *((run[-1], len(run)) for run in runs if run)]:
            beside, size, peak = self._outer_at(s)
            found.append(Ranks(alike, self._layer_options(g, min(self.flight(s))), self.limits[s] - size, peak, beside))
        return level(found, self.layers, self.fastest / self.ranks)

    def bound(self) -> Seconds:
        """A bound on the step with memory in it; infinite when nothing fits."""
        if self.ranks == 1:
            return self.micro_batches * self.relaxed(0, 0, self.layers)
        slowest = self._bottleneck(self.relaxed, self.fastest / self.ranks)
        return self._no_sooner(slowest)

    @cached_property
    def hopeless(self) -> bool:
        """Whether the ranks together have no room for all layers at their leanest, one micro-batch in flight."""
        return self._leanest > sum(self.limits)

    @property
    def _leanest(self) -> Bytes:
        return self._of_all(lambda costs: costs[2] + costs[3])

    def _of_all(self, cost: Callable[[Floats], Floats]) -> float:
        """The sum over all layers of the least `cost` of each."""
        columns = self.priced.columns
        return sum(n * float(cost(columns[g].costs).min()) for g, n in self.tables.classes.items() if g in columns)

    def can_beat(self, most: Seconds) -> bool:
        """Whether the bound with memory in it leaves room for a step of `most` seconds: cheaper than the bound itself."""
        if self.quick_bound > most:
            return False
        if self.ranks == 1:
            return self.bound() <= most
        room = most - self.hops - self.few * self.fastest  # for the slowest stage
        if room < 0:
            return False
        slowest = room / self.many if self.many else inf
        if not self._alike:
            together = self._together(slowest)
            return together and farthest(self.ranks, self.layers, self.relaxed, slowest, self.least) >= self.layers
        if not self._reaches(lambda s: self._quickly(s, slowest)):
            return False
        return self.chunks == 1 or self._reaches(lambda s: self._most(s, slowest))

    def _together(self, slowest: Seconds) -> bool:
        """Whether there would be room if the ranks had their time and their memory in common, whatever a byte is worth."""
        in_flight = min(min(self.flight(s)) for s in (0, self.ranks - 1))
        columns, classes = self.priced.columns, self.tables.classes
        layers = [(n, self._layer_options(g, in_flight)) for g, n in classes.items() if g in columns]
        room = sum(limit - min(options.peak for _, options in layers) for limit in self.limits)
        time = self.ranks * slowest - (self._fastest_outer(self.outer) if self.outer else 0.0)
        prices = {-slope for _, options in layers for slope, _ in options.edges}
        return all(sum(n * options.least(price) for n, options in layers) <= time + price * room for price in prices)

    def _reaches(self, most: Callable[[int], int]) -> bool:
        """Whether the ranks have room for all layers, when each has at most `most` and all are alike.

        Between the first and the last, of an earlier one more is in flight and passes, so that `most` never falls from one to the
        next.
        """
        ends = most(self.ranks - 1), most(0)
        left, number = self.layers - sum(ends), self.ranks - 2
        if min(ends) < self.least or number < 1:
            return min(ends) >= self.least and left <= 0
        if most(number) * number < left:
            return False
        low = most(1)
        return low >= self.least and at_least(left, most, number)

    def _quickly(self, s: int, slowest: Seconds) -> int:
        """How many layers at most stage `s` can have, no slower than that by `_quick`."""
        (g,) = self.tables.counts
        beside, size, peak = self._outer_at(s)
        return self._layer_options(g, min(self.flight(s))).most(self.limits[s] - size, peak, slowest - beside)

    def _most(self, s: int, slowest: Seconds) -> int:
        """... by `relaxed`."""
        low, high = 0, min(self._quickly(s, slowest), self.layers)
        middle = high  # which mostly holds
        while low < high:
            if self.relaxed(s, 0, middle) <= slowest:
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return low

    def _quick(self, s: int, i: int, j: int) -> Seconds:
        """A bound on a run that is cheap: all layers as if they were in the chunk with the fewest micro-batches in flight."""
        (g,), layers = self.tables.counts, j - i
        options = self._layer_options(g, min(self.flight(s)))
        beside, size, peak = self._outer_at(s)
        room = self.limits[s] - size
        if not options.fit(layers, room, peak):
            return inf
        return beside + layers * options.at((room - max(peak, options.peak)) / layers)

    @cached_property
    def least_memory(self) -> Bytes:
        """No cut and no strategies need less on the fullest rank."""
        if self.ranks == 1:
            return least_bytes(self.groups(0, 0, self.layers))
        limit = max(self.limits)
        return self._bottleneck(lambda s, i, j: self._excess(s, i, j) + limit, self._leanest / self.ranks)

    @cached_property
    def fullest(self) -> tuple[int, list[Group]]:
        """The fullest rank of the leanest cut, and what it holds."""
        limit = max(self.limits)
        cut = best_cut(self.ranks, self.layers, lambda s, i, j: self._excess(s, i, j) + limit, 1.0, 0.0, self.least)
        assert cut is not None
        runs = zip(range(self.ranks), (0, *cut.edges), cut.edges, strict=False)
        s, i, j = max(runs, key=lambda run: self._excess(*run))
        return s, self.groups(s, i, j)

    def _bottleneck(self, value: Value, low: float) -> float:
        return least_bottleneck(self.ranks, self.layers, value, low, inf, self.least)

    @cached_property
    def fits(self) -> bool:
        """Whether some cut fits when every layer takes its leanest strategy."""
        return farthest(self.ranks, self.layers, self._excess, 0.0, self.least) >= self.layers

    def solve(self, gap: float, most: Seconds = inf) -> Solution | Seconds | None:
        """The best cut and strategies; a bound on the step when it's above `most`; None when nothing fits.

        Raises `UnsolvedError` when the solver runs out of time.
        """
        while True:
            found = best_cut(
                self.ranks, self.layers, self._known, self.many, self.few, self.least, most - self.hops, self.fastest
            )
            if found is None:
                return most if most < inf and self.fits else None
            runs = list(zip(range(self.ranks), (0, *found.edges), found.edges, strict=False))
            unsolved = [run for run in runs if self._key(*run) not in self._exact]
            if not unsolved:
                return self._solution(found.cost + self.hops, runs)
            for run in sorted(unsolved, key=lambda run: -self.relaxed(*run)):
                self._exact[self._key(*run)] = self._chosen(*run, gap)
                seconds = [self._known(*each) for each in runs]
                if self.many * max(seconds) + self.few * sum(seconds) + self.hops > most:
                    break  # which the slowest stage alone may show

    def _chosen(self, s: int, i: int, j: int, gap: float) -> Choice | None:
        """The exact best of a run; the same under all outer strategies where it has nothing of the outer body."""
        known = {} if self._parts(s, i, j) or self.outer is None else self._shared
        key = (self._key(s, i, j), gap)
        if key not in known:
            groups, limit = self.groups(s, i, j), self.limits[s]
            known[key] = choose(groups, limit, gap=gap) if fits(groups, limit) else None
        return known[key]

    def _known(self, s: int, i: int, j: int) -> Seconds:
        """The best that is known of a run: solved, or bounded."""
        key = self._key(s, i, j)
        if key in self._exact:
            choice = self._exact[key]
            return choice.bound if choice is not None else inf
        return self.relaxed(s, i, j)

    def _solution(self, bound: Seconds, runs: Sequence[tuple[int, int, int]]) -> Solution:
        choices = [choice for run in runs if (choice := self._exact[self._key(*run)]) is not None]
        seconds = [choice.seconds for choice in choices]
        outer = self.outer.strategy if self.outer else choices[0].columns(OUTER, 0)[0][0].strategy
        ranks = [self._dealt(choice, *run) for choice, run in zip(choices, runs, strict=True)]
        stages = tuple(rank[chunk] for chunk in range(self.chunks) for rank in ranks)
        sizes = [sum(n for used in stage.values() for _, n in used) for stage in stages]
        cut = Cut(self.schedule, self.chunks, tuple(accumulate(sizes[:-1])))
        step = self.many * max(seconds) + self.few * sum(seconds) + self.hops
        size = max(memory(c.counts) + self.passing[s] for s, c in enumerate(choices))
        return Solution(outer, cut, stages, step, min(bound, step), size)

    def _dealt(self, choice: Choice, s: int, i: int, j: int) -> list[Assignment]:
        """A rank's columns, dealt to its chunks."""
        flight = self.flight(s)
        chunks: list[Assignment] = [{} for _ in flight]
        for g, counts in self.tables.counts.items():
            left = {held: choice.columns(g, flight.index(held)) for held in flight}
            for chunk, size in enumerate(chunk_sizes(counts[j] - counts[i], self.loads[s])):
                while size:
                    column, number = left[flight[chunk]].pop(0)
                    taken = min(size, number)
                    chunks[chunk].setdefault(g, []).append((column, taken))
                    size -= taken
                    if number > taken:
                        left[flight[chunk]].insert(0, (column, number - taken))
        return chunks
