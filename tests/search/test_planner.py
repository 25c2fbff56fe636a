"""The search over meshes: proven, deterministic, equal to the price of the written plan, honest when nothing fits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, combinations, pairwise, product
from math import inf, isinf
from typing import TypeVar

import pytest

from autoplan.constraints import Constraints
from autoplan.cost.model import OUTER, CostModel, Cut
from autoplan.cost.rank import Held, held_layers, memory, seconds
from autoplan.cost.step import LayerStep
from autoplan.errors import NothingFits, SolverError, UsageError
from autoplan.files.plan import dump_plan
from autoplan.graph import Parameter
from autoplan.schedule import additive_seconds, in_flight_by_chunk, slots
from autoplan.search import planner, tree
from autoplan.search.columns import Priced, Tables
from autoplan.search.cuts import chunk_sizes
from autoplan.search.options import Columns
from autoplan.search.planner import Progress, search
from autoplan.search.space import meshes, micro_batches, schedules, undealt, unstageable
from autoplan.search.stages import Staging
from autoplan.search.tree import Tree
from autoplan.strategy import DEGREES, Layout, Mesh
from autoplan.workload import Workload
from tests.bodies import expert_block, model
from tests.hardware import machine, uneven

T = TypeVar("T")
GRAPH = model(layers=3, hidden=1024, ffn=4096, seq=512, vocab=8192)
LOAD = Workload(global_batch=8)


class ThinTables(Tables):
    """A few of the columns, so that everything can be tried."""

    def priced(self, mesh: Mesh, micro_batch: int, stream: Layout) -> Priced | None:
        found = super().priced(mesh, micro_batch, stream)
        if found is None:
            return None
        columns = {g: Columns.of(thin(c, 3)) for g, c in found.columns.items()}
        return replace(found, columns=columns, outers=tuple(thin(found.outers, 2)))


def thin(items: Sequence[T], most: int) -> list[T]:
    """The first, the last and some between."""
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def brute_force(tables: Tables, gpus: int, limits: Sequence[float]) -> list[float]:
    """Every mesh, micro-batch, stream, schedule, outer strategy, cut and assignment of a strategy to each layer: the seconds
    of the fastest that fits into each of some limits in bytes, infinite when nothing does."""
    costs, graph = tables.costs, tables.graph
    bodies, best = [block.body for block in graph.blocks], [inf for _ in limits]
    eps, _ = undealt(gpus, {}, costs.mixtures)
    for mesh in meshes(gpus, {}, eps=eps):
        if unstageable(mesh, graph, costs.outer.order):
            continue
        for micro_batch in micro_batches(mesh, costs.workload):
            m = costs.micro_batches(mesh, micro_batch)
            for stream in tables.streams(mesh.tp):
                whole = tables.priced(mesh, micro_batch, stream)
                if whole is None:
                    continue
                for kind, chunks in schedules(mesh, m, costs):
                    priced = tables.plain(whole) if kind == "zero-bubble" else whole
                    if priced is None:
                        continue
                    priced = tables.split(priced) if kind == "zero-bubble" else priced
                    outers: list[dict[tuple[int, ...], LayerStep]] = [o.parts for o in priced.outers] or [
                        {costs.outer.busy: c.step} for c in priced.columns[OUTER]
                    ]
                    choices = [[c.step for c in priced.columns[body]] for body in bodies]
                    share = costs.share(kind, chunks, mesh, micro_batch)
                    hops = costs.hops(kind, chunks, mesh, micro_batch, stream)
                    flight = [in_flight_by_chunk(kind, s, mesh.pp, m, chunks) for s in range(mesh.pp)]
                    passing = costs.passing(mesh, micro_batch, stream, Cut(kind, chunks))
                    loads = Staging(tables, priced, priced.best_outer, kind, chunks, inf).loads
                    for starts in all_starts(len(bodies), loads):
                        edges = list(pairwise((0, *starts, len(bodies))))
                        for outer, steps in product(outers, product(*choices)):
                            ranks: list[list[Held]] = [[] for _ in range(mesh.pp)]
                            for k, (first, last) in enumerate(edges):
                                runs = [(g, step, 1) for g, step in zip(bodies[first:last], steps[first:last], strict=True)]
                                ranks[k % mesh.pp] += held_layers(runs, k // mesh.pp, chunks)
                                if regions := costs.outer.within(first, last):
                                    ranks[k % mesh.pp].append(Held(outer[regions], 1, k // mesh.pp))
                            each = [seconds(rank, slots(m, mesh.pp, share)) for rank in ranks]
                            step = additive_seconds(kind, each, m, chunks=chunks, share=share) + hops
                            if step < max(best):
                                needs = max(memory(rank, flight[s], passing[s]).total for s, rank in enumerate(ranks))
                                best = [min(b, step) if needs <= limit else b for b, limit in zip(best, limits, strict=True)]
    return best


def all_starts(layers: int, loads: Sequence[tuple[float, ...]]) -> list[tuple[int, ...]]:
    """Every cut; with several chunks those whose ranks deal their layers evenly."""
    stages, chunks = len(loads), len(loads[0])
    if chunks == 1:
        return list(combinations(range(1, layers), stages - 1))
    found = []
    for edges in combinations(range(1, layers), stages - 1):
        sizes = [chunk_sizes(j - i, beside) for (i, j), beside in zip(pairwise((0, *edges, layers)), loads, strict=True)]
        if all(min(rank) > 0 for rank in sizes):
            found.append(tuple(accumulate(sizes[s][c] for c in range(chunks) for s in range(stages)))[:-1])
    return found


CASES = [
    (layers, hidden, gpus, batch)
    for layers, hidden in ((2, 512), (3, 512), (2, 1024), (4, 256))
    for gpus in (1, 2, 3, 4)
    for batch in (1, 2, 3)
]
MEMORIES = (40.0, 0.9, 0.6, 0.45, 0.35, 0.25, 0.15)
"""Gigabytes a thousand features of hidden size, squared: 336 cases."""
MIXTURES = [(layers, experts, gpus) for layers, experts in ((1, 4), (1, 8), (2, 4), (2, 6)) for gpus in (2, 3, 4)]
MIXTURE_MEMORIES = (40.0, 0.25, 0.18, 0.12)


def limit_of(costs: CostModel) -> float:
    """What the planner fills: it leaves the solver a MiB for rounding."""
    return costs.memory_limit(0.0) - 2**20


@pytest.mark.parametrize("form", ["chosen", "sorted"])
def test_equals_brute_force_with_experts(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for 48 small mixtures of experts, which may be dealt over ep."""
    monkeypatch.setattr(planner, "Tables", ThinTables)
    monkeypatch.setattr(tree, "baselines", lambda *_: [])
    eps = set()
    for layers, experts, gpus in MIXTURES:
        block = expert_block(512, 64, 2048, experts, form=form)
        graph = model(layers=layers, hidden=512, seq=64, vocab=512, block=block)
        load = Workload(global_batch=2 * gpus, expert_imbalance=1.25)
        tables = ThinTables(CostModel(graph, machine(span=2), load))
        machines = [machine(memory=size * 1e9, span=2) for size in MIXTURE_MEMORIES]
        found = brute_force(tables, gpus, [limit_of(CostModel(graph, hardware, load)) for hardware in machines])
        for hardware, best in zip(machines, found, strict=True):
            if isinf(best):
                with pytest.raises(NothingFits):
                    search(graph, hardware, load, gpus=gpus)
                eps.add(0)
                continue
            plan = search(graph, hardware, load, gpus=gpus)
            assert plan.prediction.step_time == pytest.approx(best, rel=1.01e-4), (layers, experts, gpus, hardware)
            assert plan.solve.status == "optimal"
            eps.add(plan.mesh.ep)
    assert {0, 1, 2, 4} <= eps


@pytest.mark.parametrize(
    ("ep", "reason"), [(3, "4 experts do not divide over ep 3"), (4, "")], ids=["a divisor of the GPUs alone", "of both"]
)
def test_a_wish_for_ep_is_kept_or_refused_with_its_reason(ep: int, reason: str) -> None:
    graph = model(layers=2, block=expert_block(experts=4))
    load = Workload(global_batch=12)
    if reason:
        with pytest.raises(NothingFits, match=reason):
            search(graph, machine(), load, gpus=12, fixed={"ep": ep})
        return
    plan = search(graph, machine(), load, gpus=12, fixed={"ep": ep})
    assert plan.mesh.ep == ep
    assert all(strategy.sharding.experts for name, strategy in plan.strategies if name != plan.outer)


@pytest.mark.parametrize("part", range(8))
def test_equals_brute_force(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner against every plan of its space, on 336 small cases, infeasible ones among them."""
    monkeypatch.setattr(planner, "Tables", ThinTables)
    monkeypatch.setattr(tree, "baselines", lambda *_: [])  # they would take other columns than the thin ones
    fits = 0
    for layers, hidden, gpus, batch in CASES[part::8]:
        graph = model(layers=layers, hidden=hidden, ffn=2 * hidden, seq=256, vocab=2048)
        load = Workload(global_batch=gpus * batch)
        machines = [machine(memory=size * 1e9 * (hidden / 1000) ** 2, span=2) for size in MEMORIES]
        if part % 2:
            machines = list(map(uneven, machines))
        tables = ThinTables(CostModel(graph, machines[0], load))
        found = brute_force(tables, gpus, [limit_of(CostModel(graph, hardware, load)) for hardware in machines])
        for hardware, best in zip(machines, found, strict=True):
            if isinf(best):
                with pytest.raises(NothingFits):
                    search(graph, hardware, load, gpus=gpus)
                continue
            fits += 1
            plan = search(graph, hardware, load, gpus=gpus)
            assert plan.prediction.step_time == pytest.approx(best, rel=1.01e-4), (layers, hidden, gpus, batch, hardware)
            assert plan.solve.status == "optimal"
            assert plan.solve.gap <= 1e-4
            assert plan.solve.bound <= best * (1 + 1e-9)
    assert 0 < fits < len(CASES[part::8]) * len(MEMORIES)


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
        assert {b.name for b in plan.baselines} == {"DDP", "FSDP2 (ZeRO-3)", "FSDP2 (ZeRO-2)", "tp 8 x FSDP2"}
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


@pytest.mark.parametrize("memory_size", [40e9, 1.0e9, 0.6e9])
def test_candidates_tell_prices_that_can_be_had(memory_size: float) -> None:
    """A mesh's price is that of a plan on it, and its bounds are not above the best plan on it."""
    hardware = machine(memory=memory_size)
    plan = search(GRAPH, hardware, LOAD, gpus=8)
    best: dict[Mesh, float] = {}
    for mesh in {c.mesh for c in plan.candidates if c.status == "slower"}:
        with suppress(NothingFits):
            fixed = {axis: getattr(mesh, axis) for axis in DEGREES}
            best[mesh] = search(GRAPH, hardware, LOAD, gpus=8, fixed=fixed).prediction.step_time
    priced = [c for c in plan.candidates if c.status == "slower" and not c.bound]
    assert priced
    for candidate in priced:
        assert candidate.step_time is not None
        assert candidate.step_time >= best[candidate.mesh] * (1 - 1e-4)
    for mesh, seconds_ in best.items():
        told = [c.step_time for c in plan.candidates if c.mesh == mesh and c.step_time is not None]
        assert min(told) <= seconds_ * (1 + 1e-9)


def test_what_was_not_opened_since_nothing_fits_is_told_so() -> None:
    graph = model(layers=8, hidden=512, ffn=1024, seq=256, vocab=2048)
    wishes = Constraints(only={"schedule": ["zero-bubble"], "pp": [4]})
    plan = search(graph, machine(memory=0.1e9), Workload(global_batch=16), gpus=4, constraints=wishes)
    assert any(candidate.status == "out of memory" for candidate in plan.candidates)
    assert all(candidate.step_time is None or candidate.step_time < inf for candidate in plan.candidates)
    assert dump_plan(plan)


def test_a_search_without_time_says_so_and_claims_nothing() -> None:
    with pytest.raises(SolverError, match="passed before any plan was found"):
        search(GRAPH, machine(), LOAD, gpus=4, time_limit=0.0)


def test_an_interrupted_search_gives_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = Tree._solve

    def solve_one(tree: Tree, staging: Staging, bound: float, most: float, *gap: float) -> None:
        solve(tree, staging, bound, most, *gap)
        if tree.best is not None:
            raise KeyboardInterrupt

    whole = search(GRAPH, machine(memory=1.0e9), LOAD, gpus=8)
    monkeypatch.setattr(Tree, "_solve", solve_one)
    plan = search(GRAPH, machine(memory=1.0e9), LOAD, gpus=8)
    assert plan.solve.stopped == "interrupted"
    assert plan.solve.gap == pytest.approx(1 - plan.solve.bound / plan.prediction.step_time)
    assert plan.solve.bound <= whole.prediction.step_time * (1 + 1e-9)


def test_a_model_in_which_no_layer_repeats_is_planned() -> None:
    plan = search(model(layers=0), machine(), LOAD, gpus=4)
    assert plan.solve.status == "optimal"
    assert plan.mesh.pp == 1
    assert not plan.runs


def test_less_memory_is_never_faster() -> None:
    times = [search(GRAPH, machine(memory=size), LOAD, gpus=4).prediction.step_time for size in (40e9, 1.2e9, 1.0e9, 0.8e9)]
    assert all(a <= b * (1 + 1e-4) for a, b in pairwise(times))


def test_fixed_axes_are_kept() -> None:
    plan = search(GRAPH, machine(), LOAD, gpus=8, fixed={"tp": 4})
    assert plan.mesh.tp == 4
    with pytest.raises(UsageError, match="tp 3 does not divide 8 devices"):
        search(GRAPH, machine(), LOAD, gpus=8, fixed={"tp": 3})
    with pytest.raises(UsageError, match="does not make 8 devices"):
        search(GRAPH, machine(), LOAD, gpus=8, fixed={"pp": 1, "cp": 1, "tp": 2, "dp_shard": 2, "dp_replicate": 1})
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
