"""The search over meshes: proven, deterministic, equal to the price of the written plan, honest when nothing fits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from autoplan.cost.model import OUTER, CostModel
from autoplan.errors import NothingFits, UsageError
from autoplan.files.plan import dump_plan
from autoplan.graph import Parameter
from autoplan.search.columns import Tables
from autoplan.search.ilp import memory
from autoplan.search.planner import Progress, search
from autoplan.search.space import meshes, micro_batches
from autoplan.strategy import Mesh
from autoplan.workload import Workload
from tests.bodies import model
from tests.hardware import machine

GRAPH = model(layers=3, hidden=1024, ffn=4096, seq=512, vocab=8192)
LOAD = Workload(global_batch=8)


@pytest.mark.parametrize("memory_size", [40e9, 1.2e9, 0.9e9, 0.7e9, 0.62e9])
@pytest.mark.parametrize("gpus", [1, 4, 6])
def test_equals_brute_force_over_meshes_and_layers(memory_size: float, gpus: int) -> None:
    """Every mesh, micro-batch, stream and assignment of a strategy to each of the three layers."""
    load = Workload(global_batch=gpus * 2)
    tables = Tables(CostModel(GRAPH, machine(memory=memory_size), load))
    best = None
    for mesh in meshes(gpus, {}):
        for micro_batch in micro_batches(mesh, load):
            for entry in tables.entries(mesh, micro_batch):
                columns, outer = entry.columns[0], entry.columns[OUTER]
                for a in range(len(columns)):
                    for b in range(a, len(columns)):
                        for c in range(b, len(columns)):
                            for o in outer:
                                counts = {0: [(columns[i], 1) for i in (a, b, c)], OUTER: [(o, 1)]}
                                if memory(counts) <= memory_size - 2**20:
                                    seconds = sum(x.step.seconds for pairs in counts.values() for x, _ in pairs)
                                    best = seconds if best is None else min(best, seconds)
    if best is None:
        with pytest.raises(NothingFits):
            search(GRAPH, machine(memory=memory_size), load, gpus=gpus)
        return
    plan = search(GRAPH, machine(memory=memory_size), load, gpus=gpus)
    assert plan.prediction.step_time == pytest.approx(best, rel=1.01e-4)
    assert plan.solve.status == "optimal"
    assert plan.solve.gap <= 1e-4
    assert plan.solve.bound <= best * (1 + 1e-9)


def test_reported_cost_is_the_cost_of_the_written_plan() -> None:
    hardware = machine(memory=1.0e9)
    plan = search(GRAPH, hardware, LOAD, gpus=4)
    again = CostModel(GRAPH, hardware, LOAD).predict_plan(plan)
    assert again.step_time == pytest.approx(plan.prediction.step_time, rel=1e-12)
    assert again.memory == plan.prediction.memory
    assert plan.prediction.memory.total <= plan.memory_limit
    assert plan.prediction.time.total == pytest.approx(plan.prediction.step_time)


def test_same_input_same_bytes() -> None:
    assert dump_plan(search(GRAPH, machine(), LOAD, gpus=4)) == dump_plan(search(GRAPH, machine(), LOAD, gpus=4))


def test_no_baseline_is_faster_than_the_plan() -> None:
    for memory_size in (40e9, 1.5e9, 1.0e9):
        plan = search(GRAPH, machine(memory=memory_size), LOAD, gpus=8)
        assert {b.name for b in plan.baselines} == {"DDP", "FSDP2", "tp 8 in the node"}
        for baseline in plan.baselines:
            if baseline.step_time is not None:
                assert baseline.step_time >= plan.prediction.step_time * (1 - 1e-4)


def test_every_candidate_is_told_with_its_reason() -> None:
    plan = search(GRAPH, machine(memory=1.0e9), LOAD, gpus=4)
    assert [c.status for c in plan.candidates].count("chosen") == 1
    assert all(c.reason for c in plan.candidates)
    for candidate in plan.candidates:
        if candidate.status == "slower":
            assert candidate.step_time is not None
            assert candidate.step_time >= plan.prediction.step_time * (1 - 1e-4)
        if candidate.status == "out of memory":
            assert candidate.memory is not None
            assert candidate.memory >= plan.memory_limit


def test_less_memory_is_never_faster() -> None:
    times = [search(GRAPH, machine(memory=size), LOAD, gpus=4).prediction.step_time for size in (40e9, 1.2e9, 1.0e9, 0.8e9)]
    assert all(a <= b * (1 + 1e-4) for a, b in pairwise(times))


def test_fixed_axes_are_kept() -> None:
    plan = search(GRAPH, machine(), LOAD, gpus=8, fixed={"tp": 4})
    assert plan.mesh.tp == 4
    with pytest.raises(UsageError, match="tp 3 does not divide 8 devices"):
        search(GRAPH, machine(), LOAD, gpus=8, fixed={"tp": 3})
    with pytest.raises(UsageError, match="does not make 8 devices"):
        search(GRAPH, machine(), LOAD, gpus=8, fixed={"tp": 2, "dp_shard": 2, "dp_replicate": 1})
    with pytest.raises(UsageError, match="no mesh axis 'xp'"):
        search(GRAPH, machine(), LOAD, gpus=8, fixed={"xp": 2})


def test_nothing_fits_names_the_nearest_miss_and_what_would_help() -> None:
    with pytest.raises(NothingFits) as caught:
        search(GRAPH, machine(memory=0.1e9), LOAD, gpus=1)
    assert "nearest miss" in caught.value.message
    assert "optimizer" in caught.value.message
    assert "GPUs" in (caught.value.hint or "")


def test_an_indivisible_batch_is_illegal_not_an_error() -> None:
    plan = search(GRAPH, machine(), Workload(global_batch=6), gpus=4)
    assert any(c.status == "illegal" and c.mesh == Mesh(dp_shard=4) for c in plan.candidates)


def test_progress_is_told() -> None:
    told: list[Progress] = []
    search(GRAPH, machine(), LOAD, gpus=4, tell=told.append)
    assert told
    assert all(p.looked_at < p.total for p in told)


def test_a_scalar_parameter_is_refused_before_anything_is_planned() -> None:
    outer = replace(GRAPH.outer, parameters=(*GRAPH.outer.parameters, Parameter("temperature", (), "bfloat16")))
    with pytest.raises(UsageError, match="'temperature' is a scalar"):
        search(replace(GRAPH, outer=outer), machine(), LOAD, gpus=4)
