"""Every legal plan of a small space: all meshes, micro-batches, schedules, sequence-parallel or not, ZeRO levels, all layers
recomputed alike. Each layer takes the fastest sharding of its kind, as in the plans that people write by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autoplan.cost.context import Context
from autoplan.cost.model import CostModel
from autoplan.plan import Plan, Solve
from autoplan.schedule import ScheduleKind
from autoplan.search.baselines import uniform
from autoplan.search.columns import ALL_RECOMPUTES, Outer, Priced, Tables
from autoplan.search.planner import written
from autoplan.search.space import meshes, micro_batches, schedules, uncut, unstageable
from autoplan.search.stages import Solution, Staging
from autoplan.strategy import Mesh, Zero
from autoplan.units import Bytes

_GIVEN = Solve(status="given", gap=0.0, bound=0.0, solver="none", candidates=1)


def uniform_plans(costs: CostModel, gpus: int) -> list[Plan]:
    """All of them that fit into memory, each once."""
    found: dict[object, Plan] = {}
    for plan in _plans(costs, gpus):
        found.setdefault((plan.mesh, plan.micro_batch, plan.pipeline, plan.outer_strategy, tuple(plan.layers())), plan)
    return list(found.values())


def _plans(costs: CostModel, gpus: int) -> Iterator[Plan]:
    tables, limit = Tables(costs), costs.memory_limit(0.0)
    sizes, _ = uncut(gpus, {}, Context(costs.graph))
    for mesh in meshes(gpus, {}, sizes):
        if unstageable(mesh, costs.graph, costs.outer.order):
            continue
        for micro_batch in micro_batches(mesh, costs.workload):
            for priced in _priced(tables, mesh, micro_batch):
                for zero in _zeros(mesh):
                    for recompute in ALL_RECOMPUTES:
                        one, outer = uniform(priced, zero, recompute)
                        for schedule, chunks in schedules(mesh, costs.micro_batches(mesh, micro_batch), costs):
                            staging = _staging(tables, one, outer, schedule, chunks, limit)
                            solution = staging.solve(1e-4) if staging is not None else None
                            if staging is not None and isinstance(solution, Solution):
                                yield written(costs, staging.priced, solution, _GIVEN, [], [], limit)


def _staging(
    tables: Tables, one: Priced, outer: Outer | None, schedule: ScheduleKind, chunks: int, limit: Bytes
) -> Staging | None:
    if schedule != "zero-bubble":
        return Staging(tables, one, outer, schedule, chunks, limit)
    plain = tables.plain(replace(one, outers=(outer,) if outer else ()))
    if plain is None:
        return None
    split = tables.split(plain)
    return Staging(tables, split, split.best_outer, schedule, chunks, limit)


def _priced(tables: Tables, mesh: Mesh, micro_batch: int) -> Iterator[Priced]:
    found = (tables.priced(mesh, micro_batch, stream) for stream in tables.streams(mesh.tp))
    return (priced for priced in found if priced is not None)


def _zeros(mesh: Mesh) -> tuple[Zero, ...]:
    if mesh.shards == 1:
        return (3,)  # as those were run whose times stand in benchmarks/measured
    return (3, 1) if mesh.pp > 1 else (3, 2, 1)
