"""One honest answer from HiGHS, through PuLP 3.3 or 4.

PuLP 3 says `LpStatus == "Optimal"` also when a time limit stopped the solver; only `sol_status` tells a proof from a mere
solution. HiGHS keeps the number of threads of its first solve for the life of the process and silently does not run when
asked for another, so every solve here asks for one. An incumbent that is missing leaves the objective at 0: the flag is
tested, never the number.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import pulp

from autoplan.errors import SolverError


@dataclass(frozen=True, slots=True)
class Answer:
    """What a solve has shown."""

    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    bound: float | None
    """No solution has a smaller objective than this, when the solver told."""


def solve(problem: Any, *, gap: float, time_limit: float) -> Answer:
    """Minimise `problem` to a relative `gap`. The values are in its variables afterwards.

    Raises `SolverError` when no HiGHS can be used.
    """
    solver = pulp.HiGHS(msg=False, gapRel=gap, timeLimit=time_limit, threads=1)
    if not solver.available():
        raise SolverError("the solver HiGHS is not installed.", "Run: pip install 'highspy>=1.15,<1.16'")
    result = problem.solve(solver)
    if hasattr(result, "has_solution"):  # PuLP 4
        name = str(getattr(result.status, "name", result.status)).lower()
        if name == "optimal":
            return Answer("optimal", result.best_bound)
        if result.has_solution:
            return Answer("feasible", result.best_bound)
        return Answer("infeasible" if "infeasible" in name else "unknown", None)
    bound = _bound(problem)
    if problem.sol_status == pulp.LpSolutionOptimal:
        return Answer("optimal", bound)
    if problem.sol_status == pulp.LpSolutionIntegerFeasible:
        return Answer("feasible", bound)
    return Answer("infeasible" if problem.sol_status == pulp.LpSolutionInfeasible else "unknown", None)


def _bound(problem: Any) -> float | None:
    model = getattr(problem, "solverModel", None)
    try:
        return float(model.getInfo().mip_dual_bound) if model is not None else None
    except (AttributeError, TypeError):
        return None


def solver_name() -> str:
    """The solver and its version, for the plan's record."""
    return f"HiGHS {version('highspy')}"
