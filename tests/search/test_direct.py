"""The cut and the strategies of all stages in one integer program, with no decomposition, against `Staging.solve`.

For one staging: x[s, o] layers of stage s use option o; W is the slowest stage.

    minimise    many W + few sum_s u_s + hops        u_s = outer part + sum_o t_so x_so,  W >= u_s
    subject to  sum_s sum_o x_so = L,  sum_o x_so >= chunks,  memory of every stage with its largest moment
"""

from __future__ import annotations

from math import inf
from typing import Any

import pulp
import pytest

from autoplan.cost.model import CostModel
from autoplan.search.columns import Tables
from autoplan.search.ilp import UnsolvedError
from autoplan.search.options import precedence
from autoplan.search.solver import solve
from autoplan.search.space import meshes, micro_batches, schedules
from autoplan.search.stages import Solution, Staging
from autoplan.workload import Workload
from tests.bodies import model
from tests.hardware import machine

MIB = 2.0**20
GRAPH = model(layers=8, hidden=1024, ffn=4096, seq=512, vocab=8192)


def direct(staging: Staging, spare: float) -> tuple[float, float]:
    """(the least step, a bound on it) with so many mebibytes to spare; infinite when nothing fits. One body, one chunk a rank."""
    problem = pulp.LpProblem("direct", pulp.LpMinimize)
    slowest = problem.add_variable("w", 0, None)
    total: list[tuple[Any, float]] = []
    placed: list[tuple[Any, float]] = []
    constant = 0.0
    for s in range(staging.ranks):
        first = 0 if s == 0 else 1
        last = staging.layers if s == staging.ranks - 1 else first + 1
        layers, *outer = staging.groups(s, first, last)
        beside = sum(group.fastest.seconds for group in outer)
        size, moment = sum(group.fastest.bytes for group in outer), max((group.fastest.alone for group in outer), default=0.0)
        peak = problem.add_variable(f"p{s}", moment / MIB, None)
        inside, window = (problem.add_variable(f"{name}{s}", 0, None) for name in "iw")
        problem += inside + window <= peak
        after = sum(group.fastest.left for group in outer) + max((group.fastest.ending for group in outer), default=0.0)
        left: list[tuple[Any, float]] = []
        seconds: list[tuple[Any, float]] = []
        held: list[tuple[Any, float]] = []
        counts: list[tuple[Any, float]] = []
        freed: list[tuple[Any, float]] = []
        buffers: list[tuple[Any, float]] = []
        last_first = sorted(layers.options, key=lambda each: precedence(each, paired=True))
        for o, option in enumerate(last_first):
            x = problem.add_variable(f"x{s}_{o}", 0, staging.layers, "Integer")
            y = problem.add_variable(f"y{s}_{o}", 0, 1, "Integer")
            problem += pulp.LpAffineExpression([(x, 1.0), (y, -float(staging.layers))]) <= 0
            problem += pulp.LpAffineExpression([(y, (option.inside + option.reducing) / MIB), (inside, -1.0), *freed]) <= 0
            for other, buffer in buffers:  # a bound of its own for every layer of another option that comes later
                both = [(y, option.inside / MIB), (other, buffer / MIB), (inside, -1.0)]
                problem += pulp.LpAffineExpression([*both, *freed]) <= 0
            buffers.append((y, option.buffer))
            freed.append((x, (option.left - option.bytes) / MIB))
            problem += pulp.LpAffineExpression([(y, option.window / MIB), (window, -1.0)]) <= 0
            seconds.append((x, option.seconds * 1e3))
            held.append((x, option.bytes / MIB))
            left.append((x, option.left / MIB))
            assert option.ending == 0
            counts.append((x, 1.0))
        problem += pulp.LpAffineExpression([*seconds, (slowest, -1.0)]) <= -beside * 1e3
        problem += pulp.LpAffineExpression([*held, (peak, 1.0)]) <= (staging.limits[s] - size) / MIB - spare
        problem += pulp.LpAffineExpression(left) <= (staging.limits[s] - after) / MIB - spare
        problem += pulp.LpAffineExpression(counts) >= 1
        total += seconds
        placed += counts
        constant += beside
    problem += pulp.LpAffineExpression(placed) == staging.layers
    objective = [(slowest, staging.many), *((x, staging.few * t) for x, t in total)]
    problem.setObjective(pulp.LpAffineExpression(objective))
    answer = solve(problem, gap=1e-6, time_limit=20)
    if answer.status == "infeasible":
        return inf, inf
    if answer.status == "unknown" or answer.bound is None:
        raise UnsolvedError
    value = sum(c * x.value() for x, c in objective)
    rest = staging.few * constant + staging.hops
    return value / 1e3 + rest, answer.bound / 1e3 + rest


@pytest.mark.parametrize("memory", [40e9, 0.7e9, 0.5e9, 0.35e9])
def test_one_program_for_all_stages_finds_the_same(memory: float) -> None:
    """Every pipelined mesh of 8 devices for 8 layers, at one micro-batch size, under 1f1b."""
    costs = CostModel(GRAPH, machine(memory=memory), Workload(global_batch=16))
    tables, compared, infeasible = Tables(costs), 0, 0
    for mesh in meshes(8, {}):
        sizes = micro_batches(mesh, costs.workload)
        if mesh.pp == 1 or not sizes:
            continue
        assert ("1f1b", 1) in schedules(mesh, costs.micro_batches(mesh, 1), costs)
        for stream in tables.streams(mesh.tp):
            priced = tables.priced(mesh, 1, stream)
            if priced is None:
                continue
            staging = Staging(tables, priced, priced.outers[0], "1f1b", 1, costs.memory_limit(0.0))
            found, (best, _), (_, bound) = staging.solve(1e-6), direct(staging, 1), direct(staging, 0)  # it keeps up to one
            if found is None:
                assert best == inf
                infeasible += 1
                continue
            assert isinstance(found, Solution)
            assert bound * (1 - 1e-6) <= found.seconds <= best * (1 + 1e-5)
            compared += 1
    assert compared + infeasible >= 12
    assert (infeasible > 0) == (memory < 10e9)
