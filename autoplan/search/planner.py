"""The best plan, with proof: the tree's answer (`search.tree`), written as a plan and priced once more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from time import monotonic
from typing import Literal

from autoplan.cost.context import context_inputs
from autoplan.cost.model import CostModel
from autoplan.errors import SolverError
from autoplan.graph import Graph
from autoplan.hardware import HardwareProfile
from autoplan.plan import Baseline, Candidate, Pipeline, Plan, Solve
from autoplan.search.columns import Priced, Tables
from autoplan.search.naming import named
from autoplan.search.shortfall import nothing_fits
from autoplan.search.solver import solver_name
from autoplan.search.space import check_parameters
from autoplan.search.stages import Solution
from autoplan.search.telling import candidates, misses
from autoplan.search.tree import Progress, Tell, Tree
from autoplan.units import SECOND, Bytes, Seconds, show
from autoplan.workload import Workload

__all__ = ["Progress", "search", "written"]


def search(
    graph: Graph,
    hardware: HardwareProfile,
    workload: Workload,
    *,
    gpus: int,
    fixed: Mapping[str, int] | None = None,
    headroom: float = 0.0,
    gap: float = 1e-4,
    time_limit: Seconds = inf,
    tell: Tell | None = None,
) -> Plan:
    """The fastest plan for `gpus` devices, within a relative `gap` of the optimum of the cost model.

    A search that `time_limit` or Ctrl-C ends gives the best plan so far, which is then not called optimal (`Solve.stopped`).
    Before there is any plan Ctrl-C goes on as `KeyboardInterrupt`, and the time limit is a `SolverError`. Raises `NothingFits`
    when no plan fits into memory and `UsageError` when the wishes in `fixed` contradict each other.
    """
    check_parameters(graph)
    costs = CostModel(graph, hardware, workload)
    run = Tree(Tables(costs), gpus, fixed or {}, costs.memory_limit(headroom), gap, monotonic() + time_limit, tell)
    stopped: Literal["", "interrupted", "time limit"] = ""
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
        raise nothing_fits(run.tables, misses(run), run.refused, run.limit, gpus)
    staging, solution = run.best
    told, covered = candidates(run)
    proof = replace(_proof(solution.seconds, run.proven_bound(), gap, covered), stopped=stopped)
    return written(costs, staging.priced, solution, proof, told, run.baselines, run.limit)


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
    return Plan(
        model=graph.model,
        graph=graph.fingerprint,
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
