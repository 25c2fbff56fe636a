"""The four examples under the planner's own plans on real ranks: loss, gradients and parameters equal the single process."""

from __future__ import annotations

import traceback
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import autoplan
from autoplan.apply import ParallelModel, apply
from autoplan.apply.checkpoint import full
from autoplan.cost.model import OUTER, CostModel
from autoplan.plan import Plan, Solve
from autoplan.search.columns import Tables
from autoplan.search.ilp import Column
from autoplan.search.naming import named
from autoplan.strategy import REPLICATE, Layout, Mesh, Recompute, shard
from autoplan.workload import Workload
from tests.apply.ranks import run

pytestmark = pytest.mark.gloo

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = {"layers": 2, "hidden": 32, "heads": 4, "vocab": 64, "seq_len": 16, "ffn": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**TINY, "kv_heads": 2, "size": "125M"},
    "gpt": {**TINY, "size": "124M"},
    "hf_llama": {**TINY, "kv_heads": 2, "size": "1B"},
    "transformer": {**TINY, "dropout": 0.0},
}
# Hugging Face's Llama computes norms, rotations and the loss in float32 whatever the model's format
TOLERANCE = {"llama": 1e-10, "gpt": 1e-10, "transformer": 1e-10, "hf_llama": 1e-4}
BATCH, STEPS = 8, 3
SEQUENCE = shard(1)

Case = tuple[Mesh, Layout, Recompute, int]
CASES: dict[int, dict[str, Case]] = {
    2: {
        "dp only": (Mesh(dp_replicate=2), REPLICATE, "none", 4),
        "fsdp": (Mesh(dp_shard=2), REPLICATE, "none", 4),
        "fsdp, accumulation, recompute": (Mesh(dp_shard=2), REPLICATE, "full", 2),
        "tp": (Mesh(tp=2), REPLICATE, "none", 8),
        "tp + sp": (Mesh(tp=2), SEQUENCE, "none", 8),
        "tp + sp, recompute": (Mesh(tp=2), SEQUENCE, "full", 4),
    },
    4: {
        "hsdp": (Mesh(dp_replicate=2, dp_shard=2), REPLICATE, "none", 2),
        "tp x fsdp": (Mesh(dp_shard=2, tp=2), REPLICATE, "none", 4),
        "tp + sp x fsdp, recompute": (Mesh(dp_shard=2, tp=2), SEQUENCE, "full", 2),
        "tp + sp x dp": (Mesh(dp_replicate=2, tp=2), SEQUENCE, "none", 4),
    },
}


def load(name: str) -> Any:
    return autoplan.load_model(str(EXAMPLES / f"{name}.py"), **MODELS[name])


@cache
def tables(name: str) -> Tables:
    graph = autoplan.inspect(load(name), compute_dtype="float64")
    workload = Workload(global_batch=BATCH, param_dtype="float64", compute_dtype="float64", reduce_dtype="float64")
    return Tables(CostModel(graph, autoplan.load_hardware("cpu-gloo"), workload))


def plan_of(name: str, case: Case) -> Plan:
    """The plan of one mesh in which every layer takes the strategy that shards most of its parameters, the fastest of those."""
    mesh, stream, recompute, micro_batch = case
    entry = tables(name).entry(mesh, micro_batch, stream, (recompute,))
    assert entry is not None, "the planner has no plan for this"

    def eagerness(column: Column) -> tuple[int, float]:
        sharded = sum(layout.sharded for _, layout in column.strategy.sharding.parameters)
        return -sharded, column.step.seconds

    counts = {g: [(min(columns, key=eagerness), entry.classes[g])] for g, columns in entry.columns.items()}
    costs, graph = tables(name).costs, tables(name).graph
    strategies, outer, runs = named(graph, counts, mesh)
    by_name = dict(strategies)
    bodies = {block.name: block.body for block in graph.blocks}
    layers = [(bodies[layer], by_name[run_.strategy]) for run_ in runs for layer in run_.layers]
    prediction = costs.predict(mesh, micro_batch, by_name[outer], layers)
    if mesh.tp > 1:
        assert any(layout.sharded for _, layout in counts[0][0][0].strategy.sharding.parameters), "nothing is sharded"
        assert counts[OUTER][0][0].strategy.sharding.stream == stream
    return Plan(
        model=graph.model, graph=graph.fingerprint, hardware="cpu-gloo", hardware_fingerprint="", workload=costs.workload,
        tokens=graph.tokens, mesh=mesh, micro_batch=micro_batch, strategies=strategies, outer=outer, runs=runs, tied=graph.tied,
        prediction=prediction, memory_limit=1e12, solve=Solve(status="given", gap=0.0, bound=0.0, solver="", candidates=0),
    )  # fmt: skip


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-6, weight_decay=0.1)


def batches(name: str) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [load(name).example_inputs(BATCH) for _ in range(STEPS)]


def in_float64() -> None:
    """The examples bring their logits to float32 for the loss, as one does; here everything is to stay in float64."""
    torch.Tensor.float = lambda self: self  # type: ignore[method-assign,assignment,misc]


Result = tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]


def reference(name: str) -> Result:
    """Losses, first gradients and final parameters of three steps in one process."""
    in_float64()
    torch.manual_seed(3)
    model = load(name).build().double()
    opt, losses, gradients = optimizer(model.parameters()), [], {}
    for batch in batches(name):
        output = model(**batch)
        loss = output if isinstance(output, torch.Tensor) else output.loss
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {key: p.grad.clone() for key, p in model.named_parameters()}
        opt.step()
        opt.zero_grad()
    return losses, gradients, {key: value.clone() for key, value in model.state_dict().items()}


def parallel_run(name: str, plan: Plan) -> Result:
    parallel: ParallelModel = apply(lambda: load(name).build().double(), plan, device="cpu", seed=3)
    opt, losses, gradients = optimizer(parallel.parameters()), [], {}
    for batch in batches(name):
        share = {key: value.chunk(parallel.dp_size)[parallel.dp_rank] for key, value in batch.items()}
        losses.append(parallel.step(share).item())
        gradients = gradients or {key: full(parallel, key, p.grad) for key, p in parallel.module.named_parameters()}
        opt.step()
        opt.zero_grad()
    return losses, gradients, parallel.full_state_dict()


def differences(expected: Result, found: Result) -> dict[str, float]:
    """Largest relative error of losses, gradients and parameters."""
    errors = {"loss": max(abs(a - b) / abs(a) for a, b in zip(expected[0], found[0], strict=True))}
    for title, a, b in (("gradient", expected[1], found[1]), ("parameter", expected[2], found[2])):
        assert a.keys() == b.keys()
        scale = max(value.abs().max().item() for value in a.values())
        errors.update({f"{title} of {key}": (b[key] - a[key]).abs().max().item() / scale for key in a})
    return errors


def on_rank(name: str, plans: dict[str, Plan]) -> list[str]:
    expected = reference(name)
    wrong = []
    for title, plan in plans.items():
        try:
            errors = differences(expected, parallel_run(name, plan))
            where = max(errors, key=errors.__getitem__)
            if not errors[where] < TOLERANCE[name]:
                wrong.append(f"{title}: {where} differs by {errors[where]:.1e}")
        except Exception:
            wrong.append(f"{title}: {traceback.format_exc()}")
    return wrong


@pytest.mark.parametrize("world", list(CASES))
@pytest.mark.parametrize("name", list(MODELS))
def test_the_parallel_model_computes_the_same(name: str, world: int) -> None:
    plans = {title: plan_of(name, case) for title, case in CASES[world].items()}
    for wrong in run(world, on_rank, name, plans):
        assert not wrong, "\n".join(wrong)
