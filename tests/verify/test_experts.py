"""Dry runs of models whose experts are dealt over ep: what is sent is what the plan says, whatever ep folds into."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

import autoplan
from autoplan.capture import LoadedModel
from autoplan.cost.model import CostModel
from autoplan.graph import Graph
from autoplan.plan import Plan
from autoplan.strategy import Mesh, Recompute
from autoplan.verify import dry_run
from tests.apply.test_expert_parallel import MODELS, ROOT, TINY, plan_of

CASES: tuple[tuple[str, Mesh, dict[str, Any]], ...] = (
    ("example", Mesh(dp_shard=4, ep=2), {"micro_batch": 1, "recompute": "full"}),
    ("example", Mesh(dp_shard=2, tp=2, ep=4), {"micro_batch": 1, "recompute": "full", "zero": 2}),
    ("example", Mesh(dp_shard=2, cp=2, ep=4), {"micro_batch": 2, "zero": 1}),
    ("example", Mesh(dp_shard=2, tp=2, ep=2), {"micro_batch": 1, "recompute": "selective"}),
    ("mixtral", Mesh(dp_shard=4, ep=2), {"micro_batch": 1, "recompute": "full"}),
    ("mixtral", Mesh(pp=2, dp_shard=2, ep=2), {"micro_batch": 1, "recompute": "full"}),
    ("qwen3-moe", Mesh(dp_replicate=2, dp_shard=4, ep=4), {"micro_batch": 1, "recompute": "full"}),
    ("qwen3-moe", Mesh(dp_shard=2, tp=2, ep=2), {"micro_batch": 1}),
)


@cache
def loaded_and_graph(name: str) -> tuple[LoadedModel, Graph]:
    loaded: LoadedModel = MODELS[name][0]()
    return loaded, autoplan.inspect(loaded, compute_dtype="bfloat16")


def priced(name: str, mesh: Mesh, **options: Any) -> Plan:
    _, graph = loaded_and_graph(name)
    plan = plan_of(name, mesh, **options, dtype="float32", compute="bfloat16")
    costs = CostModel(graph, autoplan.load_hardware("cpu-gloo"), plan.workload)
    plan = replace(plan, hardware="cpu-gloo")
    return replace(plan, prediction=costs.predict_plan(plan))


@pytest.mark.parametrize(("name", "mesh", "options"), CASES, ids=[f"{name}, {mesh}" for name, mesh, _ in CASES])
def test_experts_send_what_the_plan_says(name: str, mesh: Mesh, options: dict[str, Any]) -> None:
    loaded, graph = loaded_and_graph(name)
    found = dry_run(priced(name, mesh, **options), loaded, graph)
    assert found.agrees, "\n".join(found.differences)
    assert any(row.kind == "all_to_all" for row in found.rows)
    for memory in found.memory:
        assert memory.measured <= memory.predicted


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_experts_that_are_given_sorted_rows(recompute: Recompute) -> None:
    model = str(ROOT / "tests/models/moe.py")
    wishes: dict[str, Any] = {"hardware": "cpu-gloo", "global_batch": 8, "model_kwargs": {**TINY, "layers": 4, "dense": 1}}
    plan = autoplan.plan(model, gpus=4, fixed={"dp_shard": 4, "ep": 4}, **wishes)
    strategies = tuple((n, s if n == plan.outer else replace(s, recompute=recompute)) for n, s in plan.strategies)
    plan = replace(plan, strategies=strategies)
    plan = replace(plan, prediction=autoplan.estimate(plan))
    found = dry_run(plan, autoplan.load_model(plan.model))
    assert found.agrees, "\n".join(found.differences)
    assert any(row.kind == "all_to_all" for row in found.rows)
