"""The integer program: which sharding, recomputation and resharding every layer gets, under the memory of one device.

For one mesh and micro-batch. Layers fall into classes `g` of `N_g` equal layers (the outer layer is a class of one), and
every class has strategies `s` in `S_g`, each with seconds `t_gs` and bytes `b_gs` that add up over layers, and bytes `p_gs`
that it needs only while its backward pass runs, so that the largest of them counts.

    minimise    sum_g sum_s t_gs x_gs
    subject to  sum_s x_gs = N_g                                      for every class g            (`_classes`)
                x_gs <= N_g y_gs                                      y_gs: is the strategy used?  (`_classes`)
                P >= p_gs y_gs                                        for every strategy           (`_memory`)
                sum_g sum_s b_gs x_gs + P <= M - 1 MiB                                             (`_memory`)
                x_gs in {0..N_g},  y_gs in {0, 1},  P >= 0

To the objective comes `epsilon sum y_gs` with a small `epsilon`: of two plans that are equal within the gap, the one with
fewer different strategies is the better one. The bound that is reported is one on the seconds alone.

Equal layers are interchangeable, so counting them loses nothing: the program has as many columns for 126 layers as for 2.
Shardings are the unbeaten ones of `search.shardings`; a strategy beaten by another in all three is left
out before (`unbeaten_columns`). The solver's tolerance is 1e-6 of a row in MiB; the mebibyte kept back is far more than
that, and the chosen plan's bytes are summed again exactly before it is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pulp

from autoplan.cost.model import LayerStep
from autoplan.errors import SolverError
from autoplan.search.solver import solve
from autoplan.strategy import Strategy
from autoplan.units import Bytes, Seconds

_MIB = 2.0**20


@dataclass(frozen=True)
class Column:
    """One strategy of one class of layers, priced for a whole step."""

    strategy: Strategy
    step: LayerStep

    @cached_property
    def costs(self) -> tuple[float, ...]:
        """Everything that could make another strategy preferable."""
        step = self.step
        return step.seconds, step.bytes, step.peak


@dataclass(frozen=True)
class Choice:
    """A solution: for every class, how many layers use which column."""

    counts: dict[int, tuple[tuple[Column, int], ...]]
    seconds: Seconds
    bound: Seconds
    proven: bool


class UnsolvedError(Exception):
    """The time limit passed before the solver found a solution or proved that there is none."""


def unbeaten_columns(columns: Sequence[Column]) -> list[Column]:
    """Columns that no other column equals or beats in every cost, the fastest first."""
    kept: list[Column] = []
    for column in sorted(columns, key=lambda c: c.costs):
        seconds, size, peak = column.costs
        if not any(o[0] <= seconds and o[1] <= size and o[2] <= peak for o in (other.costs for other in kept)):
            kept.append(column)
    return kept


def memory(counts: Mapping[int, Sequence[tuple[Column, int]]]) -> Bytes:
    """Exact bytes of a choice."""
    used = [(column, n) for columns in counts.values() for column, n in columns if n]
    return sum(c.step.bytes * n for c, n in used) + max(c.step.peak for c, _ in used)


def choose(
    classes: Mapping[int, int], columns: Mapping[int, Sequence[Column]], limit: Bytes, *, gap: float, time_limit: float = 60.0
) -> Choice | None:
    """The fastest choice that fits into `limit` bytes, within a relative `gap`, or None when there is none.

    `classes`: class -> number of layers; `columns`: class -> its strategies. Raises `UnsolvedError` when time runs out first.
    """
    fastest = sum(n * min(c.step.seconds for c in columns[g]) for g, n in classes.items())
    most = sum(min(n, len(columns[g])) for g, n in classes.items())
    epsilon = fastest * gap / 2 / max(most, 1)
    problem = pulp.LpProblem("plan", pulp.LpMinimize)
    counts, used = _classes(problem, classes, columns)
    _memory(problem, columns, counts, used, limit)
    seconds = [(counts[g, s], column.step.seconds) for g in columns for s, column in enumerate(columns[g])]
    problem.setObjective(_sum(seconds) + _sum([(indicator, epsilon) for indicator in used.values()]))
    answer = solve(problem, gap=gap / 2, time_limit=time_limit)
    if answer.status == "infeasible":
        return None
    if answer.status == "unknown":
        raise UnsolvedError
    chosen = {
        g: tuple((column, n) for s, column in enumerate(columns[g]) if (n := round(counts[g, s].value() or 0.0)) > 0)
        for g in classes
    }
    if any(sum(n for _, n in chosen[g]) != classes[g] for g in classes) or memory(chosen) > limit:
        raise SolverError(
            "the solver's answer does not meet the constraints it was given.", "Please report this with your model."
        )
    total = sum(column.step.seconds * n for pairs in chosen.values() for column, n in pairs)
    least = answer.bound - epsilon * most if answer.bound is not None else 0.0
    bound = min(total, max(least, fastest))
    return Choice(chosen, total, bound, answer.status == "optimal" and total - bound <= gap * total)


def _classes(
    problem: Any, classes: Mapping[int, int], columns: Mapping[int, Sequence[Column]]
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    counts, used = {}, {}
    for g, number in classes.items():
        for s in range(len(columns[g])):
            counts[g, s] = problem.add_variable(f"x_{g + 1}_{s}", 0, number, "Integer")
            used[g, s] = counts[g, s] if number == 1 else problem.add_variable(f"y_{g + 1}_{s}", 0, 1, "Integer")
            if number > 1:
                problem += _sum([(counts[g, s], 1.0), (used[g, s], -float(number))]) <= 0
        problem += _sum([(counts[g, s], 1.0) for s in range(len(columns[g]))]) == number
    return counts, used


def _memory(
    problem: Any, columns: Mapping[int, Sequence[Column]], counts: Mapping[Any, Any], used: Mapping[Any, Any], limit: Bytes
) -> None:
    peak = problem.add_variable("p", 0, None)
    for g in columns:
        for s, column in enumerate(columns[g]):
            if column.step.peak:
                problem += _sum([(used[g, s], column.step.peak / _MIB), (peak, -1.0)]) <= 0
    terms = [(counts[g, s], column.step.bytes / _MIB) for g in columns for s, column in enumerate(columns[g])]
    problem += _sum([*terms, (peak, 1.0)]) <= limit / _MIB - 1.0


def _sum(terms: Sequence[tuple[Any, float]]) -> Any:
    expression = pulp.LpAffineExpression
    return expression.from_list(list(terms)) if hasattr(expression, "from_list") else expression(list(terms))
