"""Plans drawn at random from the planner's own space, solved as the planner solves them, run and compute the same.

A draw is a mesh of four ranks, a micro-batch, a layout between layers, a schedule, an outer strategy and an amount of memory:
between what the leanest and what the fastest strategies take, so that layers of one stage come to differ.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autoplan.constraints import Constraints
from autoplan.plan import Plan, Solve
from autoplan.search.columns import Tables
from autoplan.search.planner import written
from autoplan.search.space import legal, meshes, micro_batches, schedules
from autoplan.search.stages import Solution, Staging
from tests.apply.ranks import run
from tests.test_parity import MODELS, on_rank, tables

pytestmark = pytest.mark.gloo

WORLD, DRAWS = 4, 4


def draw(known: Tables, dice: random.Random, world: int = WORLD, *, every_axis: bool = False) -> tuple[str, Plan] | None:
    """A plan and what it is; None when the dice fall outside the space. With `every_axis` cp and ep are among the axes."""
    costs = known.costs
    every = legal(world, {}, Constraints(), costs)[0] if every_axis else list(meshes(world, {}))
    mesh = dice.choice(every)
    sizes = micro_batches(mesh, costs.workload)
    if not sizes or mesh.pp > len(known.graph.blocks):
        return None
    micro_batch, stream = dice.choice(sizes), dice.choice(known.streams(mesh.tp))
    priced = known.priced(mesh, micro_batch, stream)
    if priced is None:
        return None
    kind, chunks = dice.choice(schedules(mesh, costs.micro_batches(mesh, micro_batch), costs))
    if kind == "zero-bubble":
        plain = known.plain(priced)  # as the search does
        if plain is None:
            return None
        priced = known.split(plain)
    outer = dice.choice(priced.outers) if priced.outers else None
    free = Staging(known, priced, outer, kind, chunks, 1e15).solve(1e-4)
    assert isinstance(free, Solution)
    least = Staging(known, priced, outer, kind, chunks, 1e15).least_memory
    limit = least + 2**21 + dice.random() * max(0.0, free.memory - least)
    solution = Staging(known, priced, outer, kind, chunks, limit).solve(1e-4)
    if not isinstance(solution, Solution):
        return None
    given = Solve(status="given", gap=0.0, bound=0.0, solver="", candidates=0)
    plan = written(costs, priced, solution, given, [], [], limit)
    recomputed = sum(strategy.recompute != "none" for _, strategy in plan.layers())
    title = f"{mesh}, micro-batch {micro_batch}, {kind} x {chunks}, {stream}, {recomputed} recomputed, cut {solution.cut.starts}"
    return title, replace(plan, tied=known.graph.tied)


@pytest.mark.parametrize("name", list(MODELS))
def test_plans_of_the_space_compute_the_same(name: str) -> None:
    dice = random.Random(f"{name} 1")
    plans: dict[str, Plan] = {}
    known = {deep: tables(name, deep) for deep in (False, True)}
    while len(plans) < DRAWS:
        drawn = draw(known[True], dice)
        if drawn is not None and drawn[1].mesh.pp == 1:  # the reference of a plan without a pipeline is the shallow model
            drawn = draw(known[False], dice)
            drawn = drawn if drawn is not None and drawn[1].mesh.pp == 1 else None
        if drawn is not None:
            plans[drawn[0]] = drawn[1]
    assert any(plan.mesh.pp > 1 for plan in plans.values())
    for wrong in run(WORLD, on_rank, name, plans):
        assert not wrong, "\n".join(wrong)
