"""The journey on real models: capture, plan, price again, report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import autoplan
from autoplan.errors import NothingFits, UsageError
from autoplan.graph import Graph
from autoplan.plan import Plan

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("llama", "gpt", "transformer", "hf_llama")


@pytest.fixture(scope="module", params=NAMES)
def graph(request: pytest.FixtureRequest) -> Graph:
    return autoplan.inspect(str(EXAMPLES / f"{request.param}.py"))


@pytest.fixture(scope="module")
def plan(graph: Graph) -> Plan:
    return autoplan.plan(graph, gpus=8, hardware="h100-sxm-8x")


def test_the_plan_is_proven_and_costs_what_it_says(graph: Graph, plan: Plan, tmp_path: Path) -> None:
    assert plan.solve.status == "optimal"
    assert plan.mesh.size == 8
    autoplan.save_plan(plan, tmp_path / "plan.yaml")
    again = autoplan.estimate(autoplan.load_plan(tmp_path / "plan.yaml"), graph)
    assert again.step_time == pytest.approx(plan.prediction.step_time, rel=1e-9)
    assert again.memory.total == pytest.approx(plan.prediction.memory.total, rel=1e-9)


def test_a_graph_in_another_dtype_is_refused(graph: Graph, plan: Plan) -> None:
    with pytest.raises(UsageError, match="captured in bfloat16, and the plan computes in float32"):
        autoplan.plan(graph, gpus=8, compute_dtype="float32")
    with pytest.raises(UsageError, match="captured in bfloat16"):
        autoplan.estimate(replace(plan, workload=replace(plan.workload, compute_dtype="float32")), graph)


def test_no_baseline_is_faster(plan: Plan) -> None:
    for baseline in plan.baselines:
        assert baseline.step_time is None or baseline.step_time >= plan.prediction.step_time * (1 - 1e-4)


def test_the_report_is_one_offline_page(plan: Plan) -> None:
    page = autoplan.report(plan)
    assert page.startswith("<!DOCTYPE html>") or page.startswith("<!doctype html>")
    assert len(page) < 300_000


@pytest.mark.parametrize("name", NAMES)
def test_tensor_parallel_plans_are_column_then_row(name: str) -> None:
    """The classic plan is found by the rules: what enters attention and mlp is cut by columns, what leaves them by rows."""
    wide = {"hidden": 4096, "heads": 32, "ffn": 16384, "layers": 2} if name == "transformer" else {}
    model = str(EXAMPLES / f"{name}.py")
    plan = autoplan.plan(model, gpus=8, hardware="h100-sxm-8x", fixed={"tp": 2}, global_batch=16, model_kwargs=wide)
    assert plan.solve.status == "optimal"
    for _, strategy in plan.layers():
        layouts = [str(layout) for _, layout in strategy.sharding.parameters]
        assert any(layout.startswith("Shard(0") for layout in layouts)
        assert "Shard(1)" in layouts


def test_nothing_fits() -> None:
    with pytest.raises(NothingFits) as caught:
        autoplan.plan(str(EXAMPLES / "llama.py"), gpus=1, model_kwargs={"size": "405B"})
    assert caught.value.exit_code == 1
    assert "nearest miss" in caught.value.message
    assert "--gpus" in (caught.value.hint or "")


def test_a_plan_for_another_model_is_refused() -> None:
    plan = autoplan.plan(str(EXAMPLES / "gpt.py"), gpus=2)
    with pytest.raises(UsageError, match="which the model does not have"):
        autoplan.estimate(plan, str(EXAMPLES / "llama.py"))


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"gpus": 0}, "too few"),
        ({"gpus": 8, "hardware": "h100"}, "h100-sxm-8x"),
        ({"gpus": 8, "headroom": 1.5}, "no fraction"),
        ({"gpus": 8, "gap": 0.0}, "no fraction"),
        ({"gpus": 8, "global_batch": 0}, "too small"),
        ({"gpus": 8, "optimizer": "adamax"}, "optimizer"),
    ],
)
def test_wishes_that_make_no_sense(wish: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        autoplan.plan(str(EXAMPLES / "gpt.py"), **wish)  # type: ignore[arg-type]
