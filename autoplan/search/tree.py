"""Best-first branch and bound over meshes, micro-batches and schedules.

A *family* is a size of tp, of cp and of ep, and a kind of cp, with a layout in which activations pass between layers, with a
pipeline or without; it splits into *groups*, one a micro-batch, a group into *depths*, one a number of stages, a depth into
*shapes*, one a schedule, and a shape into *stagings*, one a mesh and outer strategy, of which the outer strategy is settled last.
Each has a lower bound on the step that is valid for everything in it:

    family, group   (m / pp) sum_g N_g least_seconds(g)            forward and backward of every operation at its cheapest;
                                                                   memory, bubble and the data-parallel axes ignored. m / pp is
                                                                   the same for all meshes. A family's is taken at its largest
                                                                   micro-batch: a sample is never dearer in a larger one
    depth           Staging.early_bound of `Tables.rough`          every layer at the corner of all shardings, mixed in fractions
                                                                   under the memory of its meshes, with what these must send;
                                                                   bubble and p2p of the best schedule
    shape           ... or (m + bubble) sum_g N_g fastest_seconds  of its schedule; or the fastest sharding of every layer
    staging         Staging.early_bound                            every layer at its fastest strategy on this mesh
                    Staging.bound                                  ... in whole layers
    solved          Staging.solve                                  exact, under memory

What can't beat what is known is dropped. The node with the least bound is opened next, until no bound is below the best solution:
whatever was not opened is proven slower, and is listed with the bound that proves it. Pipelines wait until all else is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
from autoplan.search.meshes import Meshes
from autoplan.search.nodes import AnySchedule, Bounded, Depth, Family, Group, Node, Several, Shape, Unsettled, staging_of
from autoplan.search.space import unplaceable, unsplit
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

Found = tuple[Staging, Solution]

DIVE = 0.03
"""A staging that may be faster than what is known by more than this, unlike any before, is solved at once: a good plan early
prunes the rest."""
RUNNERS_UP = 4
"""Other meshes that are solved at least, if need be after the proof, so that a reader sees what they would cost."""
ATTEMPTS = 24
"""Meshes that are tried for these."""
ROUGHLY = 1e-3
"""The gap within which they are solved."""


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
        self.meshes = Meshes(tables.costs, gpus, fixed, constraints, every=top > 1)
        self.refused = list(self.meshes.refused)
        self.stagings: list[Staging] = []
        self.verdicts: list[Candidate] = []
        self.crowded: set[tuple[Mesh, int]] = set()
        """No room for parameters, gradients and optimizer states alone, or for one layer's activations."""
        self.covered: dict[tuple[Mesh, int], list[Staging]] = {}
        """Proven to be no better than what was known, by those that were."""
        self.pruned: list[Staging] = []
        """Proven to be no better than what was known; whether for want of memory or of speed is told of those that are listed."""
        self.dropped: list[Staging] = []
        """Likewise, of shapes: by `Tables.rough`, so that they say something of bounds and nothing of prices."""
        self.best: Found | None = None
        self.solutions: dict[Mesh, Found] = {}
        """The best of every mesh that was solved."""
        self.baselines = compared
        """Priced by `run` where they are not given."""
        self.at_most: Seconds = inf
        """A step that is known to be had, besides."""
        self.bounds: list[Seconds] = []
        self.plans: list[Found] = []
        """The `leaders` that were proven."""
        self.open: list[tuple[Seconds, int, Node]] = []
        self.waiting: list[tuple[Seconds, int, Node]] = []
        """Likewise, until the first ones are done."""
        self.dives: set[tuple[Within, int, ScheduleKind, int]] = set()
        self.pushed = 0

    def run(self, runners_up: int = RUNNERS_UP) -> bool:
        """Open nodes until the best solution is proven, or there is none; False when time ran out first."""
        if self.baselines is None:
            self.baselines = baselines(self.tables, self.gpus, self.limit)
        sizes = self.meshes.sizes
        for within in sorted({within for within, _ in self.meshes.by_depth}):
            if not sizes(within):
                continue
            if self.tables.least_moment(within, sizes(within)[0]) > self.limit:
                for size in sizes(within):
                    self._crowd(within, size)
                continue
            for stream in self.tables.streams(within.tp):
                bound = self._least_seconds(within, stream, sizes(within)[-1])
                for piped in (False, True):
                    if self.meshes.depths(within, piped):
                        self._push(bound, Family(within, stream, piped), self.waiting if piped else self.open)
        done = self._open_all()  # without pipelines, of which bounds say most: what is known then ends most of the others
        self.open, self.waiting = sorted([*self.open, *self.waiting]), []
        if not (done and self._open_all()):
            return False
        self.plans = self.leaders()
        if self.best is not None:
            self._runners_up(runners_up + 1 - len(self.solutions))
        return True

    def _open_all(self) -> bool:
        """Until no open node may lead to anything better; False when time ran out first."""
        while self.open and self.open[0][0] < self.aim * (1 - self.gap):
            if monotonic() > self.deadline:
                return False
            self._open_next()
        return True

    def _runners_up(self, number: int) -> None:
        """Tell the most promising other meshes by their price, not by a bound: nothing faster is left."""
        stagings = [staging_of(node) for _, _, node in self.open if not isinstance(node, Several)] + self.pruned
        by_mesh: dict[Mesh, Staging] = {}
        for staging in sorted(stagings, key=lambda each: each.quick_bound):
            if not staging.hopeless:
                by_mesh.setdefault(staging.priced.mesh, staging)
        solved = 0
        for open_ in list(by_mesh.values())[:ATTEMPTS]:
            staging = min(open_.settled, key=lambda each: each.quick_bound)
            if solved >= number or monotonic() > self.deadline:
                return
            if staging.fits and staging.priced.mesh not in self.solutions:
                self._solve(staging, staging.quick_bound, inf, ROUGHLY)
                solved += 1

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
            for size in self.meshes.sizes(node.within):
                if self.tables.least_moment(node.within, size) > self.limit:
                    self._crowd(node.within, size)
                    continue
                self._push(bound, Group(node.within, node.stream, node.piped, size))
        elif isinstance(node, Group):
            self._depths(node, bound)
        elif isinstance(node, Depth):
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
        for (at, pp), some in self.meshes.by_depth.items():
            if at == within and micro_batch in self.meshes.sizes(within, pp):
                self.crowded.update((mesh, micro_batch) for mesh in some)

    def _push(self, bound: Seconds | None, node: Node, onto: list[tuple[Seconds, int, Node]] | None = None) -> None:
        if bound is not None:
            self.pushed += 1
            heappush(self.open if onto is None else onto, (bound, self.pushed, node))

    def _slot(self, seconds: list[Seconds | None]) -> Seconds | None:
        """Of one micro-batch through all layers, from those of every class; None when some layer has none."""
        if any(t is None for t in seconds):
            return None
        return sum(n * t for n, t in zip(self.tables.classes.values(), seconds, strict=True) if t is not None)

    def _least_seconds(self, within: Within, stream: Layout, micro_batch: int) -> Seconds | None:
        slot = self._slot([self.tables.least(g, within, micro_batch, stream) for g in self.tables.classes])
        return None if slot is None else self.tables.costs.workload.global_batch * within.size / (self.gpus * micro_batch) * slot

    def _depths(self, group: Group, bound: Seconds) -> None:
        largest = self.meshes.sizes(group.within)[-1]
        for pp in self.meshes.depths(group.within, group.piped, group.micro_batch):
            depth = Depth(group.within, group.stream, group.micro_batch, pp)
            promising = self._promising(depth, largest)  # most end here, so that most micro-batches are never priced
            if promising is not None:
                self._push(max(bound, promising.early_bound), depth)

    def _promising(self, depth: Depth, largest: int) -> Staging | None:
        """No mesh is better with any schedule, by what is known of the `largest` micro-batch; None if that isn't good enough."""
        some = self.meshes.by_depth[depth.within, depth.pp]
        every = self.meshes.schedules(some[0], depth.micro_batch)
        rough = self._rough(some, depth.micro_batch, depth.stream, largest)
        if rough is None:
            self.refused += [unplaceable(mesh, depth.micro_batch, self.tables.unmet(mesh)) for mesh in some]
        elif every and self._promises(best_case := AnySchedule(self.tables, rough, every, self.limit), some):
            return best_case
        return None

    def _shapes(self, depth: Depth, bound: Seconds) -> None:
        within, size, pp = depth.within, depth.micro_batch, depth.pp
        if self._promising(depth, size) is None:
            return
        slot = self._slot([self.tables.fastest(g, within, size, depth.stream) for g in self.tables.classes])
        assert slot is not None
        some = self.meshes.by_depth[within, pp]
        for schedule, chunks in self.meshes.schedules(some[0], size):
            shape = Shape(within, depth.stream, size, pp, schedule, chunks)
            best_case = self._best_case(shape, some)
            work = best_case.slots / pp * slot + best_case.hops  # it knows the outer layer, but of the dp axes nothing
            self._push(max(bound, work, best_case.early_bound), shape)

    def _rough(self, meshes: Sequence[Mesh], micro_batch: int, stream: Layout, largest: int) -> Priced | None:
        alike = partial(self.meshes.alike, meshes[0], micro_batch)
        return self.tables.rough(meshes, alike, micro_batch, stream, largest)

    def _best_case(self, shape: Shape, meshes: Sequence[Mesh]) -> Staging:
        rough = self._rough(meshes, shape.micro_batch, shape.stream, shape.micro_batch)
        assert rough is not None
        return self._staging(rough, shape)

    def _promises(self, best_case: Staging, meshes: Sequence[Mesh]) -> bool:
        """Whether some of the meshes may beat what is known; else all are proven not to."""
        if not best_case.hopeless and best_case.can_beat(self.known):
            return True
        self.dropped.append(best_case)
        self._cover(meshes, best_case)
        return False

    def _prune(self, staging: Staging) -> None:
        self.pruned.append(staging)
        self._cover([staging.priced.mesh], staging)

    def _cover(self, meshes: Sequence[Mesh], staging: Staging) -> None:
        for key in ((mesh, staging.priced.micro_batch) for mesh in meshes):
            self.covered.setdefault(key, []).append(staging)

    def _split(self, shape: Shape, bound: Seconds) -> None:
        some = self.meshes.by_depth[shape.within, shape.pp]
        if not self._promises(self._best_case(shape, some), some):
            return
        for mesh in some:
            if self.tables.least_states(mesh) > self.limit:
                self.crowded.add((mesh, shape.micro_batch))
                continue
            if not self._promises(self._best_case(shape, [mesh]), [mesh]):
                continue
            priced = self.tables.priced(mesh, shape.micro_batch, shape.stream)
            if priced is None:
                self.refused.append(unplaceable(mesh, shape.micro_batch, self.tables.unmet(mesh)))
                continue
            if shape.schedule == "zero-bubble":
                plain = self.tables.plain(priced)
                if plain is None:
                    self.refused.append(unsplit(mesh, shape.micro_batch))
                    continue
                if not self._promises(self._staging(plain, shape), [mesh]):  # what it would be if parting the passes were free
                    continue
                priced = self.tables.split(plain)
            staging = self._staging(priced, shape)
            self.stagings.append(staging)
            several = len(priced.outers) > 1
            self._push(max(bound, staging.early_bound), Unsettled(staging) if several else staging)

    def _staging(self, priced: Priced, shape: Shape) -> Staging:
        return Staging(self.tables, priced, priced.best_outer, shape.schedule, shape.chunks, self.limit)

    def _settle(self, staging: Staging, bound: Seconds) -> None:
        if staging.hopeless or not staging.can_beat(self.known):
            self._prune(staging)
            return
        for each in staging.settled:
            self._push(max(bound, each.early_bound), each)

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
        return (min(self._by_hand, self.aim, self.at_most) if self.top == 1 else self.aim) * (1 + 1e-9)

    @cached_property
    def _by_hand(self) -> Seconds:
        kept = [b for b in self.baselines or () if self._keeps(b)]
        return min((b.step_time for b in kept if b.step_time is not None), default=inf)

    def _keeps(self, by_hand: Baseline) -> bool:
        """Whether a plan by hand is one of those that are searched."""
        mesh, allows = by_hand.mesh, self.constraints.allows
        return (
            mesh in self.meshes.by_depth.get((mesh.within, mesh.pp), ())
            and allows("micro_batch", by_hand.micro_batch)
            and (mesh.pp == 1 or allows("schedule", "1f1b"))
            and not self.constraints.placing
        )

    def _bound(self, staging: Staging, bound: Seconds) -> None:
        if staging.hopeless or not staging.can_beat(self.known):
            self._prune(staging)
            return
        bound = max(bound, staging.bound())
        alike = (staging.priced.mesh.within, staging.ranks, staging.schedule, staging.chunks)
        if bound < (1 - DIVE) * self.known and alike not in self.dives:
            self.dives.add(alike)
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
            self._prune(staging)
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
            what = str(node.within if isinstance(node, Several) else staging_of(node).priced.mesh)
            best = self.best[1].seconds if self.best else None
            self.tell(Progress(self.pushed - len(self.open) - 1, self.pushed, best, bound, what))

    def proven_bound(self) -> Seconds:
        """No plan whatever is faster than this."""
        assert self.best is not None
        return min(
            [*self.bounds, *(heap[0][0] for heap in (self.open, self.waiting) if heap), self.best[1].seconds, self._by_hand]
        )
