"""The best plan, with proof: best-first branch and bound over meshes, micro-batches and stream layouts.

Every candidate has a lower bound that costs nothing (each layer at its fastest, memory ignored: `Entry.bound`) and a least
memory (`Entry.least_memory`). Candidates are solved exactly (`search.ilp`) in the order of their bounds, until the next
bound is not below the best solution: whatever was not solved is proven slower, and is listed with that bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from autoplan.cost.model import CostModel
from autoplan.errors import SolverError
from autoplan.graph import Graph
from autoplan.hardware import HardwareProfile
from autoplan.plan import Baseline, Candidate, Plan, Solve
from autoplan.search.baselines import baselines
from autoplan.search.columns import Entry, Tables
from autoplan.search.ilp import Choice, UnsolvedError, choose
from autoplan.search.naming import named
from autoplan.search.shortfall import nothing_fits
from autoplan.search.solver import solver_name
from autoplan.search.space import indivisible, meshes, micro_batches
from autoplan.strategy import Mesh
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
    costs = CostModel(graph, hardware, workload)
    tables = Tables(costs)
    limit = costs.memory_limit(headroom)
    entries, refused = _enumerate(tables, gpus, fixed or {}, tell)
    best, candidates = _solve(entries, limit, gap, tell)
    if best is None:
        raise nothing_fits(tables, entries, refused, limit, gpus)
    entry, choice, bound = best
    proof = _proof(choice.seconds, bound, gap, len(candidates) + len(refused))
    return _plan(costs, entry, choice, proof, [*candidates, *refused], baselines(tables, gpus, limit), limit)


def _enumerate(tables: Tables, gpus: int, fixed: Mapping[str, int], tell: Tell | None) -> tuple[list[Entry], list[Candidate]]:
    workload = tables.costs.workload
    entries: list[Entry] = []
    refused: list[Candidate] = []
    everything = list(meshes(gpus, fixed))
    for number, mesh in enumerate(everything):
        if tell is not None:
            tell(Progress(number, len(everything), None, None, f"pricing {mesh}"))
        sizes = micro_batches(mesh, workload)
        if not sizes:
            refused.append(indivisible(mesh, workload))
        for micro_batch in sizes:
            found = list(tables.entries(mesh, micro_batch))
            entries.extend(found)
            if not found:
                refused.append(
                    Candidate(mesh=mesh, micro_batch=micro_batch, status="illegal", reason=_unsplittable(tables, mesh))
                )
    return entries, refused


def _unsplittable(tables: Tables, mesh: Mesh) -> str:
    return f"the model's layers cannot be placed on tp {mesh.tp} x dp_shard {mesh.dp_shard}"


def _solve(
    entries: list[Entry], limit: Bytes, gap: float, tell: Tell | None
) -> tuple[tuple[Entry, Choice, Seconds] | None, list[Candidate]]:
    """The best entry with its choice and the proven bound, and what became of every (mesh, micro-batch)."""
    best: tuple[Entry, Choice] | None = None
    verdicts: list[tuple[Entry, Candidate]] = []
    unsolved: list[Seconds] = []
    ordered = sorted(entries, key=lambda e: (e.bound, e.mesh, e.micro_batch, e.stream))
    for number, entry in enumerate(ordered):
        if tell is not None:
            tell(Progress(number, len(ordered), best[1].seconds if best else None, entry.bound, f"solving {entry.mesh}"))
        if best is not None and entry.bound >= best[1].seconds * (1 - gap):
            unsolved.append(entry.bound)
            verdicts.append((entry, _slower(entry, entry.bound, best[1].seconds, bound=True, limit=limit)))
            continue
        try:
            choice = choose(entry.classes, entry.columns, limit, gap=gap) if entry.least_memory <= limit else None
        except UnsolvedError:
            unsolved.append(entry.bound)
            verdicts.append((entry, _slower(entry, entry.bound, entry.bound, bound=True, limit=limit)))
            continue
        if choice is None:
            verdicts.append((entry, _too_big(entry, limit)))
            continue
        unsolved.append(choice.bound)
        verdicts.append((entry, _slower(entry, choice.seconds, choice.seconds, bound=False, limit=limit)))
        if best is None or choice.seconds < best[1].seconds:
            best = entry, choice
    if best is None:
        return None, []
    return (*best, min(*unsolved, best[1].seconds) if unsolved else best[1].seconds), _best_of_each(verdicts, *best)


def _slower(entry: Entry, seconds: Seconds, best: Seconds, *, bound: bool, limit: Bytes) -> Candidate:
    status = "out of memory" if entry.least_memory > limit else "slower"
    reason = f"needs at least {show(entry.least_memory, BYTE)} of {show(limit, BYTE)}" if status == "out of memory" else ""
    return Candidate(
        mesh=entry.mesh,
        micro_batch=entry.micro_batch,
        status=status,  # type: ignore[arg-type]
        reason=reason,
        step_time=None if status == "out of memory" else seconds,
        bound=bound,
        memory=entry.least_memory if status == "out of memory" else None,
    )


def _too_big(entry: Entry, limit: Bytes) -> Candidate:
    needed = entry.least_memory
    reason = (
        f"needs at least {show(needed, BYTE)} of {show(limit, BYTE)}"
        if needed > limit
        else f"no choice of strategies fits {show(limit, BYTE)}"
    )
    return Candidate(
        mesh=entry.mesh, micro_batch=entry.micro_batch, status="out of memory", reason=reason, memory=max(needed, limit)
    )


def _best_of_each(verdicts: Iterable[tuple[Entry, Candidate]], chosen: Entry, choice: Choice) -> list[Candidate]:
    """One candidate for every (mesh, micro-batch): its best stream layout; reasons relative to the chosen plan."""
    found: dict[tuple[Mesh, int], Candidate] = {}
    for entry, candidate in verdicts:
        key = (entry.mesh, entry.micro_batch)
        if entry is chosen:
            found[key] = replace(candidate, status="chosen", reason="the fastest")
        elif key not in found or (found[key].status != "chosen" and _rank(candidate) < _rank(found[key])):
            found[key] = candidate
    told = [_told(candidate, choice.seconds) for candidate in found.values()]
    return sorted(told, key=lambda c: (*_rank(c), c.mesh, c.micro_batch))


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
    memory = {"memory": prediction.memory.total}
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
        candidates=tuple(replace(c, **memory) if c.status == "chosen" else c for c in candidates[:LISTED]),  # type: ignore[arg-type]
        solve=proof,
        warnings=graph.warnings,
    )
