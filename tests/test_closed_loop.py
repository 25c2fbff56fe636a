"""The closed loop's bookkeeping: the space of plans that is run, and the figures of its page."""

from __future__ import annotations

from math import isnan

import pytest

from autoplan import api
from autoplan.cost.model import CostModel
from autoplan.files.workload import workload
from benchmarks.closed_loop import key, near
from benchmarks.closed_loop_page import Case, Row, mape, page, picture, spearman
from benchmarks.uniform_plans import uniform_plans
from tests.bodies import model
from tests.hardware import machine


def test_the_uniform_space_is_whole_and_none_of_it_beats_the_plan() -> None:
    graph, load = model(layers=4, hidden=256, ffn=512, seq=64), workload({}, {"global_batch": 8}, 4)
    plans = uniform_plans(CostModel(graph, machine(), load), 4)
    assert len({key(plan) for plan in plans}) == len(plans)
    axes = {(p.mesh.pp, p.mesh.dp_replicate, p.mesh.dp_shard, p.mesh.tp) for p in plans if p.mesh.cp == 1}
    assert axes == {
        (a, b, c, 4 // (a * b * c)) for a in (1, 2, 4) for b in (1, 2, 4) for c in (1, 2, 4) if a * b * c in (1, 2, 4)
    }
    assert {plan.pipeline.schedule for plan in plans if plan.pipeline} == {"1f1b", "gpipe", "interleaved-1f1b", "zero-bubble"}
    assert {s.recompute for plan in plans for _, s in plan.layers()} == {"none", "selective", "full"}
    assert {s.zero for plan in plans for _, s in plan.layers()} == {1, 2, 3}
    best = api.plan(graph, gpus=4, hardware=machine(), global_batch=8).prediction.step_time
    assert best <= min(plan.prediction.step_time for plan in plans) * (1 + 1e-4)


def test_plans_near_the_fastest_of_the_first_rounds_run_again() -> None:
    graph, load = model(layers=4, hidden=256, ffn=512, seq=64), workload({}, {"global_batch": 8}, 4)
    plans = uniform_plans(CostModel(graph, machine(), load), 4)[:5]
    rounds = [[[1.0], [9.0]], [[1.2, 1.3, 1.4], [1.0]], [[1.31], [1.0]], None, [[1.0]]]
    found = {key(p): {"rounds": each} if each else {"error": "no"} for p, each in zip(plans, rounds, strict=True)}
    assert near(plans, found, 1) == [plans[0], plans[1], plans[4]], "what the final rounds found does not change who is in them"


def test_rank_correlation() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert isnan(spearman([1, 1], [1, 2]))


def test_the_page_tells_how_far_the_picked_plan_is_behind() -> None:
    rows = (
        Row("tp 2", picked=True, taught=True, predicted=1.0, calibrated=1.1, measured=1.1),
        Row("pp 2", picked=False, taught=False, predicted=2.0, calibrated=1.0, measured=1.0),
        Row("dp 2", picked=False, taught=False, predicted=3.0, calibrated=3.0, measured=4.0),
    )
    case = Case("gpt", 2, rows, {"links": 2.0}, {"cp 2": "no"}, "a processor", "gpt.py")
    assert case.behind == pytest.approx(0.1)
    assert case.before == pytest.approx(mape([1, 2, 3], [1.1, 1, 4]))
    assert case.after == pytest.approx(0.125), "what calibrated is not counted"
    text = page([case])
    assert "| gpt | 2 | 3 | 1 s | +10.0% | 0.500 |" in text
    assert "did not run: cp 2: no" in text
    assert text.index("| 1 | pp 2 |") < text.index("| 2 | tp 2 **(picked)** |")
    assert picture(case).startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert picture(case).count("<circle") == 6
