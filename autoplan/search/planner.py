"""The best plan, with proof: best-first branch and bound.

A *family* is a tp degree with a layout in which activations pass between layers; it splits into *groups*, one a micro-batch,
and a group into *entries*, one a mesh. Each has a lower bound on the step that is valid for everything in it:

    family, group   m sum_g N_g fastest_seconds(g)     forward and backward of the fastest sharding of every layer; memory and
                                                       the data-parallel axes ignored. A family's is taken at its largest
                                                       micro-batch: a sample is never dearer in a larger one.
    entry           Entry.bound                        every layer at its fastest strategy on this mesh; memory ignored
    solved          the integer program (search.ilp)   exact, under memory

The node with the least bound is opened next, until no bound is below the best solution: whatever was not opened is proven
slower, and is listed with the bound that proves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from autoplan.cost.model import CostModel
from autoplan.errors import SolverError
from autoplan.graph import Graph
from autoplan.hardware import HardwareProfile
from autoplan.plan import Baseline, Candidate, Plan, Solve
from autoplan.search.baselines import baselines
from autoplan.search.columns import Entry, Tables
from autoplan.search.ilp import Choice, UnsolvedError, choose, memory
from autoplan.search.naming import named
from autoplan.search.shortfall import nothing_fits
from autoplan.search.solver import solver_name
from autoplan.search.space import check_parameters, indivisible, meshes, micro_batches, unplaceable
from autoplan.strategy import Layout, Mesh
from autoplan.units import BYTE, SECOND, Bytes, Seconds, show
from autoplan.workload import Workload


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the search is."""

    looked_at: int
    total: int
    best: Seconds | None
    bound: Seconds | None
    note: str


Tell = Callable[[Progress], None]

LISTED = 64
"""Candidates that a plan lists, the best first; the proof covers all of them."""
RUNNERS_UP = 8
"""Candidates that are solved after the proof, so that a reader sees what they would cost."""


def search(
    graph: Graph,
    hardware: HardwareProfile,
    workload: Workload,
    *,
    gpus: int,
    fixed: Mapping[str, int] | None = None,
    headroom: float = 0.0,
    gap: float = 1e-4,
    tell: Tell | None = None,
) -> Plan:
    """The fastest plan for `gpus` devices, within a relative `gap` of the optimum of the cost model.

    Raises `NothingFits` when no plan fits into memory and `UsageError` when the wishes in `fixed` contradict each other.
    """
    check_parameters(graph)
    costs = CostModel(graph, hardware, workload)
    run = _Search(Tables(costs), gpus, fixed or {}, costs.memory_limit(headroom), gap, tell)
    run.run()
    if run.best is None:
        raise nothing_fits(run.tables, run.entries, run.refused, run.limit, gpus)
    entry, choice = run.best
    candidates = run.candidates()
    proof = _proof(choice.seconds, run.proven_bound(), gap, len(candidates))
    return _plan(costs, entry, choice, proof, candidates, baselines(run.tables, gpus, run.limit), run.limit)


@dataclass(frozen=True)
class _Family:
    """All meshes and micro-batches of one tp degree and stream layout."""

    tp: int
    stream: Layout


@dataclass(frozen=True)
class _Group:
    """All meshes of one tp degree, stream layout and micro-batch."""

    tp: int
    stream: Layout
    micro_batch: int


class _Search:
    """The open nodes by their bounds, the best solution, and what became of every entry."""

    def __init__(self, tables: Tables, gpus: int, fixed: Mapping[str, int], limit: Bytes, gap: float, tell: Tell | None) -> None:
        self.tables, self.limit, self.gap, self.tell = tables, limit, gap, tell
        self.meshes: dict[int, list[Mesh]] = {}
        self.sizes: dict[int, list[int]] = {}
        self.refused: list[Candidate] = []
        self.entries: list[Entry] = []
        self.verdicts: list[Candidate] = []
        self.best: tuple[Entry, Choice] | None = None
        self.bounds: list[Seconds] = []
        self.open: list[tuple[Seconds, int, _Family | _Group | Entry]] = []
        self.pushed = 0
        for mesh in meshes(gpus, fixed):
            sizes = micro_batches(mesh, tables.costs.workload)
            if sizes:
                self.meshes.setdefault(mesh.tp, []).append(mesh)
                self.sizes[mesh.tp] = sizes
            else:
                self.refused.append(indivisible(mesh, tables.costs.workload))

    def run(self) -> None:
        """Open nodes until the best solution is proven, or there is none."""
        for tp in self.meshes:
            for stream in self.tables.streams(tp):
                self._push(self._least_seconds(tp, stream, self.sizes[tp][-1]), _Family(tp, stream))
        while self.open and (self.best is None or self.open[0][0] < self.best[1].seconds * (1 - self.gap)):
            self._open_next()
        if self.best is not None:  # nothing faster is left: what follows only tells runners-up by their price, not by a bound
            enough = len(self.verdicts) + RUNNERS_UP
            while self.open and len(self.verdicts) < enough:
                self._open_next()

    def _open_next(self) -> None:
        bound, _, node = heappop(self.open)
        self._report(bound, node)
        if isinstance(node, _Family):
            for size in self.sizes[node.tp]:
                self._push(self._least_seconds(node.tp, node.stream, size), _Group(node.tp, node.stream, size))
        elif isinstance(node, _Group):
            self._split(node, bound)
        else:
            self._solve(node)

    def _push(self, bound: Seconds | None, node: _Family | _Group | Entry) -> None:
        if bound is not None:
            self.pushed += 1
            heappush(self.open, (bound, self.pushed, node))

    def _least_seconds(self, tp: int, stream: Layout, micro_batch: int) -> Seconds | None:
        batches = self.sizes[tp][-1] // micro_batch
        seconds = [self.tables.fastest(g, tp, micro_batch, stream) for g in self.tables.classes]
        if any(t is None for t in seconds):
            return None
        return batches * sum(n * t for n, t in zip(self.tables.classes.values(), seconds, strict=True) if t is not None)

    def _split(self, group: _Group, bound: Seconds) -> None:
        for mesh in self.meshes[group.tp]:
            entry = self.tables.entry(mesh, group.micro_batch, group.stream)
            if entry is None:
                self.refused.append(unplaceable(mesh, group.micro_batch))
            else:
                self.entries.append(entry)
                self._push(max(bound, entry.bound), entry)

    def _solve(self, entry: Entry) -> None:
        try:
            choice = choose(entry.classes, entry.columns, self.limit, gap=self.gap) if entry.least_memory <= self.limit else None
        except UnsolvedError:
            self.bounds.append(entry.bound)
            self.verdicts.append(_slower(entry.mesh, entry.micro_batch, entry.bound, bound=True))
            return
        if choice is None:
            self.verdicts.append(_too_big(entry, self.limit))
            return
        self.bounds.append(choice.bound)
        solved = _slower(entry.mesh, entry.micro_batch, choice.seconds, bound=False)
        self.verdicts.append(replace(solved, memory=memory(choice.counts)))
        if self.best is None or choice.seconds < self.best[1].seconds:
            self.best = entry, choice

    def _report(self, bound: Seconds, node: _Family | _Group | Entry) -> None:
        if self.tell is not None:
            what = str(node.mesh) if isinstance(node, Entry) else f"tp {node.tp}"
            best = self.best[1].seconds if self.best else None
            self.tell(Progress(self.pushed - len(self.open) - 1, self.pushed, best, bound, what))

    def proven_bound(self) -> Seconds:
        """No plan whatever is faster than this."""
        assert self.best is not None
        return min([*self.bounds, *(bound for bound, _, _ in self.open[:1]), self.best[1].seconds])

    def candidates(self) -> list[Candidate]:
        """What became of every (mesh, micro-batch), the best first, with its reason."""
        assert self.best is not None
        found = _best_of_each(self.verdicts, self._unopened(), self.refused)
        entry, choice = self.best
        found[entry.mesh, entry.micro_batch] = _slower(entry.mesh, entry.micro_batch, choice.seconds, bound=False)
        told = [
            replace(candidate, status="chosen", reason="the fastest")
            if key == (entry.mesh, entry.micro_batch)
            else _told(candidate, choice.seconds)
            for key, candidate in found.items()
        ]
        return sorted(told, key=lambda c: (*_rank(c), c.mesh, c.micro_batch))

    def _unopened(self) -> Iterator[Candidate]:
        for bound, _, node in self.open:
            if isinstance(node, Entry):
                yield _slower(node.mesh, node.micro_batch, bound, bound=True)
            else:
                sizes = [node.micro_batch] if isinstance(node, _Group) else self.sizes[node.tp]
                for mesh in self.meshes[node.tp]:
                    for size in sizes:
                        yield _slower(mesh, size, bound, bound=True)


def _slower(mesh: Mesh, micro_batch: int, seconds: Seconds, *, bound: bool) -> Candidate:
    return Candidate(mesh=mesh, micro_batch=micro_batch, status="slower", reason="", step_time=seconds, bound=bound)


def _too_big(entry: Entry, limit: Bytes) -> Candidate:
    needed = entry.least_memory
    if needed > limit:
        reason = f"needs at least {show(needed, BYTE)} of {show(limit, BYTE)}"
    else:
        reason = f"no choice of strategies fits {show(limit, BYTE)}"
    return Candidate(
        mesh=entry.mesh, micro_batch=entry.micro_batch, status="out of memory", reason=reason, memory=max(needed, limit)
    )


def _best_of_each(*verdicts: Iterable[Candidate]) -> dict[tuple[Mesh, int], Candidate]:
    """One candidate for every (mesh, micro-batch): that of its best stream layout."""
    found: dict[tuple[Mesh, int], Candidate] = {}
    for candidate in (c for some in verdicts for c in some):
        key = (candidate.mesh, candidate.micro_batch)
        if key not in found or _rank(candidate) < _rank(found[key]):
            found[key] = candidate
    return found


def _rank(candidate: Candidate) -> tuple[int, float]:
    order = {"chosen": 0, "slower": 1, "out of memory": 2, "illegal": 3}[candidate.status]
    return order, candidate.step_time if candidate.step_time is not None else candidate.memory or 0.0


def _told(candidate: Candidate, best: Seconds) -> Candidate:
    if candidate.status != "slower" or candidate.step_time is None:
        return candidate
    more = 100 * (candidate.step_time / best - 1)
    least = "at least " if candidate.bound else ""
    return replace(candidate, reason=f"{least}{show(candidate.step_time, SECOND)}, {least}{more:.2g} % slower")


def _proof(seconds: Seconds, bound: Seconds, gap: float, candidates: int) -> Solve:
    """What was shown: optimal only if the bound over *all* candidates is within the gap."""
    shown = max(0.0, (seconds - bound) / seconds)
    return Solve(
        status="optimal" if shown <= gap else "feasible", gap=shown, bound=bound, solver=solver_name(), candidates=candidates
    )


def _plan(
    costs: CostModel,
    entry: Entry,
    choice: Choice,
    proof: Solve,
    candidates: list[Candidate],
    priced: list[Baseline],
    limit: Bytes,
) -> Plan:
    graph = costs.graph
    strategies, outer, runs = named(graph, choice.counts, entry.mesh)
    by_name = dict(strategies)
    bodies = {block.name: block.body for block in graph.blocks}
    layers = [(bodies[name], by_name[run.strategy]) for run in runs for name in run.layers]
    prediction = costs.predict(entry.mesh, entry.micro_batch, by_name[outer], layers)
    if abs(prediction.step_time - choice.seconds) > 1e-9 * choice.seconds or prediction.memory.total > limit:
        raise SolverError("the plan's price is not the one that the search found.", "Please report this with your model.")
    size = prediction.memory.total
    return Plan(
        model=graph.model,
        graph=graph.fingerprint,
        hardware=costs.hardware.name,
        hardware_fingerprint=costs.hardware.fingerprint,
        workload=costs.workload,
        tokens=graph.tokens,
        mesh=entry.mesh,
        micro_batch=entry.micro_batch,
        strategies=strategies,
        outer=outer,
        runs=runs,
        tied=graph.tied,
        prediction=prediction,
        memory_limit=limit,
        baselines=tuple(priced),
        candidates=tuple(replace(c, memory=size) if c.status == "chosen" else c for c in candidates[:LISTED]),
        solve=proof,
        warnings=graph.warnings,
    )
