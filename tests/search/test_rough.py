"""What is said of many meshes at once, and early of one, against what one of them is solved to."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from autoplan import api
from autoplan.constraints import Constraints
from autoplan.cost.data_parallel import data_parallel
from autoplan.cost.model import CostModel
from autoplan.schedule import ScheduleKind
from autoplan.search.columns import Tables
from autoplan.search.meshes import Meshes, with_less_cp
from autoplan.search.nodes import AnySchedule
from autoplan.search.rough import Rough
from autoplan.search.stages import Solution, Staging
from autoplan.strategy import REPLICATE, UNSHARDED, Layout, Mesh, Strategy, Zero
from autoplan.workload import DType, Workload
from tests.bodies import expert_block, model
from tests.hardware import machine, uneven

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE = model(layers=8, hidden=1024, ffn=4096, seq=512, vocab=8192)
SPARSE = model(layers=4, hidden=512, seq=256, vocab=4096, block=expert_block(512, 256, 1024, experts=4))


@pytest.mark.parametrize(("memory", "network"), [(40e9, 0.5e9), (0.7e9, 25e9), (0.45e9, 0.5e9)])
def test_no_mesh_is_better(memory: float, network: float) -> None:
    """Every mesh of 8 devices, at two micro-batches, under every schedule."""
    _compare(CostModel(DENSE, machine(memory=memory, network=network, span=4), Workload(global_batch=16)))


def test_no_mesh_is_better_with_experts() -> None:
    """Likewise, where a mesh has ep."""
    _compare(CostModel(SPARSE, machine(memory=0.4e9, network=5e9, span=4), Workload(global_batch=8)))


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("network", [0.5e9, 25e9])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_of_every_level_it_is_the_least(zero: Zero, network: float, dtype: DType) -> None:
    """Of a layer alone, whichever of its computation, copies and messages takes longest."""
    load, mesh = Workload(global_batch=64, compute_dtype=dtype), Mesh(dp_shard=8)
    costs = CostModel(DENSE, machine(network=network, span=4), load)
    cost = costs.layer_cost(0, UNSHARDED, 1, 1)
    dp = data_parallel(cost, mesh, costs.hardware, costs.workload)
    rough = Rough(cost, REPLICATE, [dp], 8, [("none", zero)], costs, outer=False, pipelined=False)
    least, step = rough.columns([0])[0].costs, costs.layer_step(0, Strategy(zero=zero), mesh, 1)
    assert 8 * least.slot_seconds + least.once_seconds <= (8 * step.slot_seconds + step.once_seconds) * (1 + 1e-9)


def test_no_mesh_is_better_where_ranks_wait() -> None:
    """Likewise, on ranks that are uneven and DTensors that take time."""
    _compare(CostModel(DENSE, uneven(machine(memory=0.7e9, span=4)), Workload(global_batch=16)))


def _compare(costs: CostModel) -> None:
    tables, limit, compared = Tables(costs), costs.memory_limit(0.0), 0
    meshes = Meshes(costs, 8, {}, Constraints())
    for (within, pp), some in meshes.by_depth.items():
        sizes = meshes.sizes(within, pp)
        for size in {sizes[0], sizes[-1]}:
            every = meshes.schedules(some[0], size)
            for stream in tables.streams(within.tp):
                for largest in {size, sizes[-1]}:
                    rough = tables.rough(some, lambda of=some[0], at=size: meshes.alike(of, at), size, stream, largest)
                    assert rough is not None
                    any_schedule = AnySchedule(tables, rough, every, limit)
                    for schedule, chunks in every:
                        best_case = Staging(tables, rough, rough.best_outer, schedule, chunks, limit)
                        assert any_schedule.early_bound <= best_case.early_bound * (1 + 1e-9)
                        for mesh in some:
                            seconds = _solved(tables, mesh, size, stream, schedule, chunks, limit)
                            if seconds < inf:
                                assert not best_case.hopeless
                                assert best_case.can_beat(seconds * (1 + 1e-6))
                                assert any_schedule.can_beat(seconds * (1 + 1e-6))
                                assert best_case.early_bound <= seconds * (1 + 1e-6)
                                compared += 1
    assert compared >= 60


@pytest.mark.parametrize("memory", [40e9, 14e6])
@pytest.mark.parametrize("spec", ["gpt.py?size=124M", "llama.py?size=125M&kv_heads=4"])
def test_cp_that_shares_a_divisor_with_the_micro_batch_is_never_better(spec: str, memory: float) -> None:
    """Every such mesh of 8 devices, with either kind of cp, under every schedule, against the one with less cp."""
    small = "layers=4&hidden=64&heads=8&ffn=128&vocab=256&seq_len=64"
    graph = api.inspect(str(EXAMPLES / f"{spec}&{small}"), compute_dtype="bfloat16")
    costs = CostModel(graph, uneven(machine(memory=memory, network=5e9, span=4)), Workload(global_batch=8))
    tables, limit = Tables(costs), costs.memory_limit(0.0)
    meshes, every = Meshes(costs, 8, {}, Constraints()), Meshes(costs, 8, {}, Constraints(), every=True)
    assert {mesh.cp_kind for mesh, _ in meshes.beaten} == {"ulysses", "ring"}
    fits = 0
    for mesh, size in sorted(meshes.beaten):
        assert size in every.sizes(mesh.within, mesh.pp)
        assert size not in meshes.sizes(mesh.within, mesh.pp)
        for stream in tables.streams(mesh.tp):
            for schedule, chunks in meshes.schedules(mesh, size):
                beaten = _solved(tables, mesh, size, stream, schedule, chunks, limit)
                better = _solved(tables, *with_less_cp(mesh, size), stream, schedule, chunks, limit)
                assert better <= beaten * (1 + 1e-6)
                fits += beaten < inf
    assert fits


def _solved(tables: Tables, mesh: Mesh, size: int, stream: Layout, schedule: ScheduleKind, chunks: int, limit: float) -> float:
    priced = tables.priced(mesh, size, stream)
    if priced is not None and schedule == "zero-bubble":
        priced = tables.plain(priced)
    if priced is None:
        return inf
    if schedule == "zero-bubble":
        free = Staging(tables, priced, priced.best_outer, schedule, chunks, limit)
        priced = tables.split(priced)
        parted = Staging(tables, priced, priced.best_outer, schedule, chunks, limit)
        assert free.early_bound <= parted.early_bound * (1 + 1e-9), "parting the passes makes nothing better"
    best = inf
    for outer in priced.outers or (None,):
        staging = Staging(tables, priced, outer, schedule, chunks, limit)
        found = staging.solve(1e-6)
        if isinstance(found, Solution):
            assert staging.early_bound <= found.seconds * (1 + 1e-6)
            best = min(best, found.seconds)
    return best
