"""Best-first branch and bound over meshes, micro-batches and schedules.

A *family* is a size of tp, of cp and of ep, and a kind of cp, with a layout in which activations pass between layers; it splits
into *groups*, one a micro-batch, a group into *shapes*, one a number of stages and a schedule, and a shape into *stagings*, one a
mesh and outer strategy, of which the outer strategy is settled last. Each has a lower bound on the step that is valid for
everything in it:

    family, group   (m / pp) sum_g N_g least_seconds(g)            forward and backward of every operation at its cheapest;
                                                                   memory, bubble and the data-parallel axes ignored. m / pp is
                                                                   the same for all meshes. A family's is taken at its largest
                                                                   micro-batch: a sample is never dearer in a larger one
    shape           (m + bubble) sum_g N_g fastest_seconds(g)      of the fastest sharding of every layer, with the bubble and the
                                                                   p2p of its schedule; it is dropped where not even a dp axis
                                                                   that sends nothing and cuts all states makes it fit in time
                                                                   (`Tables.rough` at little cost, `Tables.ideal`)
    staging         Staging.quick_bound                            every layer at its fastest strategy on this mesh
                    Staging.bound                                  ... under memory, strategies mixed in fractions
    solved          Staging.solve                                  exact, under memory

The node with the least bound is opened next, until no bound is below the best solution: whatever was not opened is proven
slower, and is listed with the bound that proves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heappop, heappush
from math import inf
from time import monotonic

from autoplan.constraints import Constraints
from autoplan.plan import Baseline, Candidate
from autoplan.schedule import ScheduleKind
from autoplan.search.baselines import baselines
from autoplan.search.candidates import slower
from autoplan.search.columns import Priced, Tables
from autoplan.search.ilp import UnsolvedError
from autoplan.search.space import indivisible, legal, micro_batches, schedules, unplaceable, unsplit, unstageable
from autoplan.search.stages import Solution, Staging
from autoplan.strategy import Layout, Mesh, Within
from autoplan.units import Bytes, Seconds


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the search is."""

    looked_at: int
    total: int
    best: Seconds | None
    bound: Seconds | None
    note: str


Tell = Callable[[Progress], None]

DIVE = 0.03
"""A staging that may be faster than what is known by more than this is solved at once: a good plan early prunes the rest."""
RUNNERS_UP = 4
"""Other meshes that are solved after the proof, so that a reader sees what they would cost."""
ATTEMPTS = 24
"""Meshes that are tried for these."""
ROUGHLY = 1e-3
"""The gap within which they are solved."""


@dataclass(frozen=True)
class Family:
    """All meshes and micro-batches of one size of tp, cp and ep, and stream layout."""

    within: Within
    stream: Layout


@dataclass(frozen=True)
class Group:
    """All meshes of one size of tp, cp and ep, stream layout and micro-batch."""

    within: Within
    stream: Layout
    micro_batch: int


@dataclass(frozen=True)
class Shape:
    """... of one number of stages and one schedule."""

    within: Within
    stream: Layout
    micro_batch: int
    pp: int
    schedule: ScheduleKind
    chunks: int


@dataclass(frozen=True)
class Unsettled:
    """A staging with the best of all outer strategies in every part: none with one of them is better."""

    staging: Staging


@dataclass(frozen=True)
class Bounded:
    """A staging whose bound has memory in it."""

    staging: Staging


Found = tuple[Staging, Solution]
Node = Family | Group | Shape | Unsettled | Staging | Bounded


class Tree:
    """The open nodes by their bounds, the best solution, and what became of every staging."""

    def __init__(
        self,
        tables: Tables,
        gpus: int,
        fixed: Mapping[str, int],
        constraints: Constraints,
        limit: Bytes,
        gap: float,
        deadline: Seconds,
        tell: Tell | None,
        top: int = 1,
        compared: list[Baseline] | None = None,
    ) -> None:
        self.tables, self.gpus, self.limit, self.gap = tables, gpus, limit, gap
        self.deadline, self.tell, self.constraints, self.top = deadline, tell, constraints, top
        self.meshes: dict[tuple[Within, int], list[Mesh]] = {}
        """By (tp, cp and ep; pp)."""
        self.refused: list[Candidate]
        self.stagings: list[Staging] = []
        self.verdicts: list[Candidate] = []
        self.crowded: set[tuple[Mesh, int]] = set()
        """No room for parameters, gradients and optimizer states alone, or for one layer's activations."""
        self.covered: set[tuple[Mesh, int]] = set()
        """Proven to be no better than what was known, all meshes of a shape together."""
        self.pruned: list[Staging] = []
        """Proven to be no better than what was known; whether for want of memory or of speed is told of those that are listed."""
        self.dropped: list[Staging] = []
        """Likewise, of shapes: on an ideal mesh (`Tables.ideal`), so that they say something of bounds and nothing of prices."""
        self.best: Found | None = None
        self.solutions: dict[Mesh, Found] = {}
        """The best of every mesh that was solved."""
        self.baselines = compared
        """Priced by `run` where they are not given."""
        self.bounds: list[Seconds] = []
        self.plans: list[Found] = []
        """The `leaders` that were proven."""
        self.open: list[tuple[Seconds, int, Node]] = []
        self.pushed = 0
        self._known_sizes: dict[tuple[Within, int | None], list[int]] = {}
        load, order = tables.costs.workload, tables.costs.outer.order
        found, self.refused = legal(gpus, fixed, constraints, tables.costs.context, tables.costs.mixtures)
        for mesh in found:
            refused = unstageable(mesh, tables.graph, order)
            if refused is None and not micro_batches(mesh, load):
                refused = indivisible(mesh, load)
            if refused is None and not self._allowed_sizes(mesh):
                continue
            if refused is None:
                self.meshes.setdefault((mesh.within, mesh.pp), []).append(mesh)
            else:
                self.refused.append(refused)

    def run(self) -> bool:
        """Open nodes until the best solution is proven, or there is none; False when time ran out first."""
        if self.baselines is None:
            self.baselines = baselines(self.tables, self.gpus, self.limit)
        for within in sorted({within for within, _ in self.meshes}):
            if self.tables.least_moment(within, self.sizes(within)[0]) > self.limit:
                for size in self.sizes(within):
                    self._crowd(within, size)
                continue
            for stream in self.tables.streams(within.tp):
                self._push(self._least_seconds(within, stream, self.sizes(within)[-1]), Family(within, stream))
        while self.open and self.open[0][0] < self.aim * (1 - self.gap):
            if monotonic() > self.deadline:
                return False
            self._open_next()
        self.plans = self.leaders()
        if self.best is not None:
            self._runners_up()
        return True

    def _runners_up(self) -> None:
        """Tell the most promising other meshes by their price, not by a bound: nothing faster is left."""
        nodes = [node.staging if isinstance(node, Bounded | Unsettled) else node for _, _, node in self.open]
        stagings = [node for node in nodes if isinstance(node, Staging)] + self.pruned
        by_mesh: dict[Mesh, Staging] = {}
        for staging in sorted(stagings, key=lambda each: each.quick_bound):
            if not staging.hopeless:
                by_mesh.setdefault(staging.priced.mesh, staging)
        solved = 0
        for open_ in list(by_mesh.values())[:ATTEMPTS]:
            staging = min(open_.settled, key=lambda each: each.quick_bound)
            if solved == RUNNERS_UP or monotonic() > self.deadline:
                return
            if staging.fits and staging.priced.mesh not in self.solutions:
                self._solve(staging, staging.quick_bound, inf, ROUGHLY)
                solved += 1

    def sizes(self, within: Within, pp: int | None = None) -> list[int]:
        """Micro-batches that some mesh of this tp, cp and ep (and pp) can run."""
        if (within, pp) not in self._known_sizes:
            some = [meshes[0] for at, meshes in self.meshes.items() if at[0] == within and pp in (None, at[1])]
            self._known_sizes[within, pp] = sorted({size for mesh in some for size in self._allowed_sizes(mesh)})
        return self._known_sizes[within, pp]

    def _allowed_sizes(self, mesh: Mesh) -> list[int]:
        sizes = micro_batches(mesh, self.tables.costs.workload)
        return [size for size in sizes if self.constraints.allows("micro_batch", size)]

    def _open_next(self) -> None:
        bound, number, node = heappop(self.open)
        try:
            self._open(bound, node)
        except BaseException:  # the proof must not lose what was not finished
            heappush(self.open, (bound, number, node))
            raise

    def _open(self, bound: Seconds, node: Node) -> None:
        self._report(bound, node)
        if isinstance(node, Family):
            for size in self.sizes(node.within):
                if self.tables.least_moment(node.within, size) > self.limit:
                    self._crowd(node.within, size)
                    continue
                self._push(self._least_seconds(node.within, node.stream, size), Group(node.within, node.stream, size))
        elif isinstance(node, Group):
            self._shapes(node, bound)
        elif isinstance(node, Shape):
            self._split(node, bound)
        elif isinstance(node, Unsettled):
            self._settle(node.staging, bound)
        elif isinstance(node, Staging):
            self._bound(node, bound)
        else:
            self._solve(node.staging, bound, self.known)

    def _crowd(self, within: Within, micro_batch: int) -> None:
        for (at, pp), some in self.meshes.items():
            if at == within and micro_batch in self.sizes(within, pp):
                self.crowded.update((mesh, micro_batch) for mesh in some)

    def _push(self, bound: Seconds | None, node: Node) -> None:
        if bound is not None:
            self.pushed += 1
            heappush(self.open, (bound, self.pushed, node))

    def _slot(self, within: Within, stream: Layout, micro_batch: int, *, roughly: bool = False) -> Seconds | None:
        """Seconds of one micro-batch through all layers at their fastest shardings, or a bound; None when some layer has none."""
        of = self.tables.least if roughly else self.tables.fastest
        seconds = [of(g, within, micro_batch, stream) for g in self.tables.classes]
        if any(t is None for t in seconds):
            return None
        return sum(n * t for n, t in zip(self.tables.classes.values(), seconds, strict=True) if t is not None)

    def _least_seconds(self, within: Within, stream: Layout, micro_batch: int) -> Seconds | None:
        slot = self._slot(within, stream, micro_batch, roughly=True)
        return None if slot is None else self.tables.costs.workload.global_batch * within.size / (self.gpus * micro_batch) * slot

    def _shapes(self, group: Group, bound: Seconds) -> None:
        slot = self._slot(group.within, group.stream, group.micro_batch)
        costs = self.tables.costs
        for (within, pp), some in self.meshes.items():
            if within != group.within or slot is None or group.micro_batch not in self.sizes(within, pp):
                continue
            m = costs.micro_batches(some[0], group.micro_batch)
            for schedule, chunks in schedules(some[0], m, self.tables.graph):
                if pp > 1 and not self.constraints.allows("schedule", schedule):
                    continue
                share = costs.share(schedule, chunks, some[0], group.micro_batch)
                hops = costs.hops(schedule, chunks, some[0], group.micro_batch, group.stream)
                work = (m + (pp - 1) * share) / pp * slot + hops
                shape = Shape(within, group.stream, group.micro_batch, pp, schedule, chunks)
                self._push(max(bound, work), shape)

    def _split(self, shape: Shape, bound: Seconds) -> None:
        some = self.meshes[shape.within, shape.pp]
        for ideal in self._ideals(shape, some[0]):
            if ideal is None:
                self.refused += [unplaceable(mesh, shape.micro_batch) for mesh in some]
                return
            best_case = Staging(self.tables, ideal, next(iter(ideal.outers), None), shape.schedule, shape.chunks, self.limit)
            if best_case.hopeless or not best_case.can_beat(self.known):
                self.dropped.append(best_case)
                self.covered.update((mesh, shape.micro_batch) for mesh in some)
                return
        for mesh in self.meshes[shape.within, shape.pp]:
            if self.tables.least_states(mesh) > self.limit:
                self.crowded.add((mesh, shape.micro_batch))
                continue
            priced = self.tables.priced(mesh, shape.micro_batch, shape.stream)
            if priced is not None and shape.schedule == "zero-bubble":
                priced = self.tables.split(priced)
                if priced is None:
                    self.refused.append(unsplit(mesh, shape.micro_batch))
                    continue
            if priced is None:
                self.refused.append(unplaceable(mesh, shape.micro_batch))
                continue
            staging = Staging(self.tables, priced, priced.best_outer, shape.schedule, shape.chunks, self.limit)
            self.stagings.append(staging)
            several = len(priced.outers) > 1
            self._push(max(bound, staging.quick_bound), Unsettled(staging) if several else staging)

    def _settle(self, staging: Staging, bound: Seconds) -> None:
        if staging.hopeless or not staging.can_beat(self.known):
            self.pruned.append(staging)
            return
        for each in staging.settled:
            self._push(max(bound, each.quick_bound), each)

    def _ideals(self, shape: Shape, mesh: Mesh) -> Iterator[Priced | None]:
        """What no mesh of a shape beats: where there is something to beat, first what tells it at little cost."""
        if self.known < inf:
            yield self.tables.rough(mesh, shape.micro_batch, shape.stream)
        yield self.tables.ideal(mesh, shape.micro_batch, shape.stream)

    def leaders(self) -> list[Found]:
        """The best solutions of the `top` best meshes that are known, the fastest first."""
        return sorted(self.solutions.values(), key=lambda found: found[1].seconds)[: self.top]

    @property
    def aim(self) -> Seconds:
        """The step of the last of the `top` plans that are asked for."""
        found = self.leaders()
        return found[-1][1].seconds if len(found) == self.top else inf

    @property
    def known(self) -> Seconds:
        """A step that can be had: the aim, or that of a plan by hand that keeps the wishes."""
        return (min(self._by_hand, self.aim) if self.top == 1 else self.aim) * (1 + 1e-9)

    @cached_property
    def _by_hand(self) -> Seconds:
        kept = [b for b in self.baselines or () if self._keeps(b)]
        return min((b.step_time for b in kept if b.step_time is not None), default=inf)

    def _keeps(self, by_hand: Baseline) -> bool:
        """Whether a plan by hand is one of those that are searched."""
        mesh, allows = by_hand.mesh, self.constraints.allows
        return (
            mesh in self.meshes.get((mesh.within, mesh.pp), ())
            and allows("micro_batch", by_hand.micro_batch)
            and (mesh.pp == 1 or allows("schedule", "1f1b"))
            and not self.constraints.placing
        )

    def _bound(self, staging: Staging, bound: Seconds) -> None:
        if staging.hopeless or not staging.can_beat(self.known):
            self.pruned.append(staging)
            return
        bound = max(bound, staging.bound())
        if bound < (1 - DIVE) * self.known:
            self._solve(staging, bound, self.known)
        else:
            self._push(bound, Bounded(staging))

    def _solve(self, staging: Staging, bound: Seconds, most: Seconds, gap: float | None = None) -> None:
        try:
            solution = staging.solve(max(gap or 0.0, self.gap), most)
        except UnsolvedError:
            self.bounds.append(bound)
            self.verdicts.append(slower(staging, bound, bound=True))
            return
        if solution is None:
            self.pruned.append(staging)
        elif isinstance(solution, float):
            self.bounds.append(solution)
            self.verdicts.append(slower(staging, solution, bound=True))
        else:
            if gap is None:  # else the mesh was proven to be no better before
                self.bounds.append(solution.bound)
            self.verdicts.append(replace(slower(staging, solution.seconds, bound=False), memory=solution.memory))
            mesh = staging.priced.mesh
            if mesh not in self.solutions or solution.seconds < self.solutions[mesh][1].seconds:
                self.solutions[mesh] = staging, solution
            if self.best is None or solution.seconds < self.best[1].seconds:
                self.best = staging, solution

    def _report(self, bound: Seconds, node: Node) -> None:
        if self.tell is not None:
            staging = node.staging if isinstance(node, Bounded | Unsettled) else node
            what = str(staging.priced.mesh) if isinstance(staging, Staging) else str(staging.within)
            best = self.best[1].seconds if self.best else None
            self.tell(Progress(self.pushed - len(self.open) - 1, self.pushed, best, bound, what))

    def proven_bound(self) -> Seconds:
        """No plan whatever is faster than this."""
        assert self.best is not None
        return min([*self.bounds, *(bound for bound, _, _ in self.open[:1]), self.best[1].seconds, self._by_hand])
