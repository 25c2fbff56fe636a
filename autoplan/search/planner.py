"""The best plan, with proof: the tree's answer (`search.tree`), written as a plan and priced once more."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from time import monotonic
from typing import Literal, Required, TypedDict, Unpack

from autoplan.constraints import Constraints
from autoplan.cost.context import context_inputs
from autoplan.cost.model import CostModel
from autoplan.cost.simulated import simulated
from autoplan.errors import SolverError
from autoplan.graph import Graph
from autoplan.hardware import HardwareProfile
from autoplan.plan import Baseline, Candidate, Pipeline, Plan, Point, Solve
from autoplan.search.baselines import baselines
from autoplan.search.columns import Priced, Tables
from autoplan.search.frontier import frontier, point
from autoplan.search.naming import named
from autoplan.search.shortfall import nothing_fits
from autoplan.search.solver import solver_name
from autoplan.search.space import check_parameters
from autoplan.search.stages import Solution
from autoplan.search.telling import candidates, misses, refusals
from autoplan.search.tree import Progress, Tell, Tree
from autoplan.search.wishes import divided
from autoplan.units import SECOND, Bytes, Seconds, show
from autoplan.workload import Workload

__all__ = ["Asked", "Progress", "plans", "search", "written"]


Stopped = Literal["", "interrupted", "time limit"]


class Asked(TypedDict, total=False):
    """What a search may be told besides model, machine and workload."""

    gpus: Required[int]
    fixed: Mapping[str, int] | None
    constraints: Constraints | None
    headroom: float
    gap: float
    time_limit: Seconds
    frontier: int
    """Plans of the line of time against memory."""
    tell: Tell | None


def search(graph: Graph, hardware: HardwareProfile, workload: Workload, **asked: Unpack[Asked]) -> Plan:
    """The fastest plan for `gpus` devices, within a relative `gap` of the optimum of the cost model. See `plans`."""
    return plans(graph, hardware, workload, 1, **asked)[0]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Next to nothing that a search makes refers to itself: to look for such things takes a tenth of its time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_uncollected()
def plans(graph: Graph, hardware: HardwareProfile, workload: Workload, top: int, **asked: Unpack[Asked]) -> list[Plan]:
    """The fastest plan, and those of the `top - 1` next best meshes: none on another mesh is faster, within the gap.

    A search that `time_limit` or Ctrl-C ends gives the best plan so far, which is then not called optimal (`Solve.stopped`).
    Before there is any plan Ctrl-C goes on as `KeyboardInterrupt`, and the time limit is a `SolverError`. Raises `NothingFits`
    when no plan fits into memory and `UsageError` when the wishes in `fixed` or `constraints` contradict each other.
    With `frontier` the first plan gets so many of the fastest plans on less memory; what ends this search leaves those known.
    """
    check_parameters(graph)
    gpus, gap, time_limit = asked["gpus"], asked.get("gap", 1e-4), asked.get("time_limit", inf)
    constraints = asked.get("constraints") or Constraints()
    costs = CostModel(graph, hardware, workload)
    limit = costs.memory_limit(asked.get("headroom", 0.0))
    tables, compared = Tables(costs), None
    if constraints.placing:
        compared = baselines(tables, gpus, limit)  # of what people write by hand nothing is asked
        parted, wishes = divided(graph, constraints)
        tables = Tables(CostModel(parted, hardware, workload), wishes)
    deadline = monotonic() + time_limit

    def tree(limit: Bytes, top: int, compared: list[Baseline] | None) -> Tree:
        fixed, tell = asked.get("fixed") or {}, asked.get("tell")
        return Tree(tables, gpus, fixed, constraints, limit, gap, deadline, tell, top, compared)

    run = tree(limit, top, compared)
    stopped: Stopped = ""
    try:
        stopped = "" if run.run() else "time limit"
    except KeyboardInterrupt:
        if run.best is None:
            raise
        stopped = "interrupted"
    if run.best is None and stopped:
        raise SolverError(
            f"{show(time_limit, SECOND)} passed before any plan was found.", "Give --time-limit more, or fix an axis: --pp 1."
        )
    if run.best is None:
        raise nothing_fits(run.tables, misses(run), refusals(run), limit, gpus, constrained=constraints != Constraints())
    told, covered = candidates(run)
    found, bound = run.plans or run.leaders(), run.proven_bound()
    all_found = [
        written(
            tables.costs,
            staging.priced,
            solution,
            replace(_proof(solution.seconds, bound, gap, covered), stopped=stopped),
            told if number == 0 else [],
            run.baselines or [],
            limit,
            graph.fingerprint,
        )
        for number, (staging, solution) in enumerate(found)
    ]
    number = asked.get("frontier", 0)
    if number > 1 and not stopped:
        leaner = _Leaner(tables.costs, lambda limit, compared: tree(limit, 1, compared), run.baselines or [])
        first = point(all_found[0], asked.get("headroom", 0.0))
        least = min(tables.least_states(mesh) for some in run.meshes.by_depth.values() for mesh in some)
        line = frontier(first, costs.memory_limit(0.0), least, number, leaner.fastest)
        all_found[0] = replace(all_found[0], frontier=line, solve=replace(all_found[0].solve, stopped=leaner.stopped))
    return all_found


class _Leaner:
    """The same search under tighter limits: what was priced for the first one holds for all."""

    def __init__(self, costs: CostModel, tree: Callable[[Bytes, list[Baseline]], Tree], baselines: Sequence[Baseline]) -> None:
        self.costs, self.tree, self.baselines = costs, tree, baselines
        self.stopped: Stopped = ""

    def fastest(self, headroom: float, can_be_had: Seconds) -> Point | None:
        """Proven; None when nothing fits, or the search was stopped. `can_be_had`: a step of a leaner plan."""
        if self.stopped:
            return None
        limit = self.costs.memory_limit(headroom)
        fitting = [each for each in self.baselines if each.memory is not None and each.memory <= limit]
        try:
            run = self.tree(limit, fitting)
            run.at_most = can_be_had * (1 + run.gap)  # which that plan, solved anew, is within
            if not run.run(runners_up=0):
                self.stopped = "time limit"
            if run.best is None or self.stopped:
                return None
            staging, solution = run.best
            proof = _proof(solution.seconds, run.proven_bound(), run.gap, candidates=0)
            plan = written(self.costs, staging.priced, solution, proof, [], [], limit)
        except KeyboardInterrupt:
            self.stopped = "interrupted"
            return None
        return point(plan, headroom) if proof.status == "optimal" else None


def _proof(seconds: Seconds, bound: Seconds, gap: float, candidates: int) -> Solve:
    """What was shown: optimal only if the bound over *all* candidates is within the gap."""
    shown = max(0.0, (seconds - bound) / seconds)
    return Solve(
        status="optimal" if shown <= gap else "feasible", gap=shown, bound=bound, solver=solver_name(), candidates=candidates
    )


def written(
    costs: CostModel,
    priced: Priced,
    solution: Solution,
    proof: Solve,
    candidates: list[Candidate],
    compared: list[Baseline],
    limit: Bytes,
    fingerprint: str = "",
) -> Plan:
    """A solution as a plan, priced once more as what was written: the same to 1e-9. Raises `SolverError` where it isn't."""
    graph, mesh = costs.graph, priced.mesh
    strategies, outer, runs = named(graph, solution, mesh)
    by_name = dict(strategies)
    bodies = {block.name: block.body for block in graph.blocks}
    layers = [(bodies[name], by_name[run.strategy]) for run in runs for name in run.layers]
    prediction = costs.predict(mesh, priced.micro_batch, by_name[outer], layers, solution.cut)
    if abs(prediction.step_time - solution.seconds) > 1e-9 * solution.seconds or prediction.memory.total > limit:
        raise SolverError("the plan's price is not the one that the search found.", "Please report this with your model.")
    size = prediction.memory.total
    starts = tuple(graph.blocks[i].name for i in solution.cut.starts)
    cut = solution.cut
    plan = Plan(
        model=graph.model,
        graph=fingerprint or costs.given.fingerprint,
        hardware=costs.hardware.name,
        hardware_fingerprint=costs.hardware.fingerprint,
        workload=costs.workload,
        tokens=graph.tokens,
        mesh=mesh,
        micro_batch=priced.micro_batch,
        strategies=strategies,
        outer=outer,
        runs=runs,
        pipeline=Pipeline(schedule=cut.schedule, chunks=cut.chunks, split_before=starts) if mesh.pp > 1 else None,
        context=context_inputs(graph) if mesh.cp > 1 else (),
        tied=graph.tied,
        prediction=prediction,
        memory_limit=limit,
        baselines=tuple(compared),
        candidates=tuple(replace(c, memory=size) if c.status == "chosen" else c for c in candidates),
        solve=proof,
        warnings=graph.warnings,
    )
    return replace(plan, prediction=simulated(costs, plan))
