"""Time against memory: every plan is the fastest of its limit, none is beaten, and the search for them changes nothing else."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from autoplan.constraints import Constraints, LayerWish
from autoplan.errors import NothingFits
from autoplan.plan import Point
from autoplan.search.frontier import frontier, unbeaten
from autoplan.search.planner import search
from autoplan.strategy import Mesh
from autoplan.workload import Workload
from tests.bodies import model
from tests.hardware import machine

GRAPH = model(layers=4, hidden=1024, ffn=4096, seq=512, vocab=8192)
LOAD = Workload(global_batch=16)
DEVICE = machine(memory=3e9)


@pytest.mark.parametrize("constraints", [None, Constraints(layers={"*": LayerWish(zero=3)})], ids=["free", "zero 3"])
def test_every_plan_of_the_line_is_the_best_of_its_limit(constraints: Constraints | None) -> None:
    plan = search(GRAPH, DEVICE, LOAD, gpus=2, constraints=constraints, frontier=4)
    assert replace(plan, frontier=()) == search(GRAPH, DEVICE, LOAD, gpus=2, constraints=constraints)
    assert len(plan.frontier) == 4
    for point in plan.frontier:
        alone = search(GRAPH, DEVICE, LOAD, gpus=2, constraints=constraints, headroom=point.headroom).prediction
        assert point.step_time == pytest.approx(alone.step_time, rel=2e-4)
    for full, lean in pairwise(plan.frontier):
        assert lean.memory < full.memory
        assert lean.step_time > full.step_time


def test_the_line_ends_where_nothing_fits() -> None:
    plan = search(GRAPH, DEVICE, LOAD, gpus=2, fixed={"pp": 1, "tp": 1}, frontier=6)
    leanest = 1 - plan.frontier[-1].memory / (DEVICE.device.memory - DEVICE.device.reserved)
    with pytest.raises(NothingFits):
        search(GRAPH, DEVICE, LOAD, gpus=2, fixed={"pp": 1, "tp": 1}, headroom=leanest + 0.2)


def test_an_interrupt_leaves_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from autoplan.search import planner

    calls: list[int] = []

    class Interrupted(planner.Tree):
        def run(self, runners_up: int = 4) -> bool:
            calls.append(runners_up)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().run(runners_up)

    monkeypatch.setattr(planner, "Tree", Interrupted)
    plan = search(GRAPH, DEVICE, LOAD, gpus=2, frontier=8)
    assert (plan.solve.status, plan.solve.stopped) == ("optimal", "interrupted")
    assert 1 <= len(plan.frontier) <= 2
    assert calls == [4, 0, 0]


def point(memory: float, seconds: float, headroom: float = 0.0) -> Point:
    return Point(
        headroom=headroom, mesh=Mesh(), micro_batch=1, recompute="none", step_time=seconds, memory=memory, tokens_per_second=1.0
    )


def test_few_searches_show_the_whole_line() -> None:
    """Of machines that take 3 - 2 bytes / 100 seconds, down to 20 bytes."""
    asked: list[float] = []

    def solve(headroom: float, can_be_had: float) -> Point | None:
        asked.append(headroom)
        left = 100 * (1 - headroom)
        assert can_be_had > 3 - left / 50
        return None if left < 20 else point(left, 3 - left / 50, headroom)

    found = frontier(point(100, 1.0), 100, 5, 8, solve)
    assert len(found) == 8
    assert found[0].memory == 100
    assert 25 < found[-1].memory < 60, "twice as slow as the first is lean enough"
    assert max(a.memory - b.memory for a, b in pairwise(found)) < 30
    assert len(asked) <= 14


def test_a_plan_that_is_the_fastest_of_many_limits_is_one_point() -> None:
    both = [point(80, 1.0), point(30, 2.0)]
    found = frontier(both[0], 100, 10, 8, lambda headroom, _: replace(both[1], headroom=headroom) if headroom <= 0.7 else None)
    assert [(p.memory, p.step_time) for p in found] == [(80, 1.0), (30, 2.0)]


def test_what_a_leaner_plan_equals_is_left_out() -> None:
    assert unbeaten([point(80, 1.0), point(60, 1.0), point(40, 2.0)]) == (point(60, 1.0), point(40, 2.0))
