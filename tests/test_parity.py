"""The four examples under the planner's shardings on real ranks: loss, gradients and parameters equal the single process."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import autoplan
from autoplan.apply import ParallelModel, apply
from autoplan.apply.checkpoint import gathered
from autoplan.cost.context import context_inputs
from autoplan.cost.model import OUTER, CostModel
from autoplan.plan import Plan
from autoplan.schedule import ScheduleKind
from autoplan.search.columns import Tables
from autoplan.strategy import REPLICATE, Layout, Mesh, Recompute, Zero, shard
from autoplan.workload import Workload
from tests.apply.plans import make
from tests.apply.ranks import run

pytestmark = pytest.mark.gloo

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = {"layers": 2, "hidden": 32, "heads": 4, "vocab": 64, "seq_len": 16, "ffn": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**TINY, "kv_heads": 2, "size": "125M"},
    "gpt": {**TINY, "size": "124M"},
    "hf_llama": {**TINY, "kv_heads": 2, "size": "1B"},
    "transformer": {**TINY, "layers": 1, "dropout": 0.0},  # of the encoder and of the decoder
}
DEEP = {name: {**changes, "layers": 2 * changes["layers"]} for name, changes in MODELS.items()}
"""For pipelines, which want four layers."""
# Hugging Face's Llama computes norms, rotations and the loss in float32 whatever the model's format
TOLERANCE = {"llama": 1e-10, "gpt": 1e-10, "transformer": 1e-10, "hf_llama": 1e-4}
BATCH, STEPS = 8, 2
SEQUENCE = shard(1)


@dataclass(frozen=True)
class Case:
    mesh: Mesh
    micro_batch: int
    stream: Layout = REPLICATE
    recompute: Recompute = "none"
    zero: Zero = 3
    schedule: ScheduleKind = "1f1b"
    chunks: int = 1
    cuts: tuple[int, ...] | None = None


CASES: dict[int, dict[str, Case]] = {
    2: {
        "dp only": Case(Mesh(dp_replicate=2), 4),
        "dp only, zero 1, accumulation": Case(Mesh(dp_replicate=2), 1, zero=1),
        "fsdp": Case(Mesh(dp_shard=2), 4),
        "fsdp, accumulation, recompute": Case(Mesh(dp_shard=2), 2, recompute="full"),
        "zero 2, accumulation": Case(Mesh(dp_shard=2), 2, zero=2),
        "zero 1, accumulation": Case(Mesh(dp_shard=2), 1, zero=1),
        "tp": Case(Mesh(tp=2), 8),
        "tp + sp": Case(Mesh(tp=2), 8, SEQUENCE),
        "tp + sp, recompute": Case(Mesh(tp=2), 4, SEQUENCE, "full"),
        "cp": Case(Mesh(cp=2), 4),
        "cp, zero 1, recompute": Case(Mesh(cp=2), 1, recompute="full", zero=1),
    },
    4: {
        "hsdp": Case(Mesh(dp_replicate=2, dp_shard=2), 2),
        "hsdp, zero 1, recompute": Case(Mesh(dp_replicate=2, dp_shard=2), 1, recompute="full", zero=1),
        "tp x fsdp": Case(Mesh(dp_shard=2, tp=2), 4),
        "tp + sp x fsdp, recompute": Case(Mesh(dp_shard=2, tp=2), 2, SEQUENCE, "full"),
        "tp + sp x dp": Case(Mesh(dp_replicate=2, tp=2), 4, SEQUENCE),
        "cp x fsdp": Case(Mesh(dp_shard=2, cp=2), 2),
        "cp, heads of keys shared": Case(Mesh(cp=4), 8),
        "cp x dp": Case(Mesh(dp_replicate=2, cp=2), 2, recompute="full"),
        "cp x tp": Case(Mesh(cp=2, tp=2), 4, zero=1),
        "cp x tp + sp, recompute": Case(Mesh(cp=2, tp=2), 4, SEQUENCE, "full"),
    },
}
PIPELINES: dict[int, dict[str, Case]] = {
    2: {
        "gpipe": Case(Mesh(pp=2), 2, schedule="gpipe"),
        "1f1b, cut unevenly": Case(Mesh(pp=2), 2, cuts=(1,)),
        "zero 1, recompute": Case(Mesh(pp=2), 2, recompute="full", zero=1),
        "1f1b, recompute, one micro-batch": Case(Mesh(pp=2), 8, recompute="full", cuts=(3,)),
        "interleaved": Case(Mesh(pp=2), 2, schedule="interleaved-1f1b", chunks=2),
        "zero-bubble, zero 1": Case(Mesh(pp=2), 2, zero=1, schedule="zero-bubble"),
        "zero-bubble, recompute, cut unevenly": Case(Mesh(pp=2), 2, recompute="full", schedule="zero-bubble", cuts=(1,)),
    },
    4: {
        "deep": Case(Mesh(pp=4), 2),
        "deep, fewer micro-batches": Case(Mesh(pp=4), 4),
        "deep, fewer micro-batches, gpipe": Case(Mesh(pp=4), 4, schedule="gpipe"),
        "fsdp": Case(Mesh(pp=2, dp_shard=2), 1),
        "zero 1": Case(Mesh(pp=2, dp_shard=2), 1, zero=1),
        "zero 2, gpipe, recompute": Case(Mesh(pp=2, dp_shard=2), 2, recompute="full", zero=2, schedule="gpipe"),
        "zero 1, interleaved": Case(Mesh(pp=2, dp_shard=2), 1, zero=1, schedule="interleaved-1f1b", chunks=2),
        "fsdp, interleaved, recompute": Case(Mesh(pp=2, dp_shard=2), 1, REPLICATE, "full", 3, "interleaved-1f1b", 2),
        "dp": Case(Mesh(pp=2, dp_replicate=2), 1),
        "cp": Case(Mesh(pp=2, cp=2), 2, recompute="full"),
        "tp": Case(Mesh(pp=2, tp=2), 2),
        "tp + sp": Case(Mesh(pp=2, tp=2), 2, SEQUENCE),
        "deep, zero-bubble": Case(Mesh(pp=4), 1, schedule="zero-bubble"),
        "zero 1, zero-bubble, selective": Case(Mesh(pp=2, dp_shard=2), 1, REPLICATE, "selective", 1, "zero-bubble"),
        "tp + sp, zero-bubble": Case(Mesh(pp=2, tp=2), 2, SEQUENCE, schedule="zero-bubble"),
        "tp + sp, interleaved, recompute": Case(Mesh(pp=2, tp=2), 2, SEQUENCE, "full", 3, "interleaved-1f1b", 2),
    },
}
RINGS: dict[int, dict[str, Case]] = {
    2: {
        "ring": Case(Mesh(cp=2, cp_kind="ring"), 4),
        "ring, selective": Case(Mesh(cp=2, cp_kind="ring"), 8, recompute="selective"),
    },
    4: {
        "ring": Case(Mesh(cp=4, cp_kind="ring"), 8, recompute="full"),
        "ring x fsdp": Case(Mesh(dp_shard=2, cp=2, cp_kind="ring"), 2),
        "pp x ring": Case(Mesh(pp=2, cp=2, cp_kind="ring"), 2),
    },
}
"""Of the models without masks."""
SHARES = {"transformer": (0, 1), "gpt": (0, 3), "llama": (1, 3), "hf_llama": (2, 3)}
"""The first case that a model tries, and how far on the next one is: decoders differ little, so that here the encoder-decoder
and one of them try every case. In benchmarks/parity_matrix.py all do."""


def load(name: str, deep: bool = False) -> Any:
    return autoplan.load_model(str(EXAMPLES / f"{name}.py"), **(DEEP if deep else MODELS)[name])


@cache
def tables(name: str, deep: bool) -> Tables:
    graph = autoplan.inspect(load(name, deep), compute_dtype="float64")
    workload = Workload(global_batch=BATCH, param_dtype="float64", compute_dtype="float64", reduce_dtype="float64")
    return Tables(CostModel(graph, autoplan.load_hardware("cpu-gloo"), workload))


def plan_of(name: str, case: Case) -> Plan:
    """A plan in which every layer takes the planner's sharding that shards most of its parameters."""
    known = tables(name, case.mesh.pp > 1)
    chosen = {}
    for g in known.classes:
        shardings = known.shardings(g, case.mesh.within, case.micro_batch, case.stream)
        assert shardings, "the planner has no plan for this"
        chosen[g] = max(shardings, key=lambda sharding: sum(layout.sharded for _, layout in sharding.parameters))
        assert chosen[g].stream == case.stream
        assert case.mesh.tp == 1 or any(layout.sharded for _, layout in chosen[g].parameters), "nothing is sharded"
    layers = {block.name: chosen[block.body] for block in known.graph.blocks}
    plan = make(
        layers, chosen[OUTER], case.mesh, micro_batch=case.micro_batch, batch=BATCH, recompute=case.recompute, zero=case.zero,
        schedule=case.schedule, chunks=case.chunks, cuts=case.cuts,
    )  # fmt: skip
    context = context_inputs(known.graph) if case.mesh.cp > 1 else ()
    return replace(plan, tied=known.graph.tied, context=context)


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-6, weight_decay=0.1)


@cache
def batches(name: str) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [load(name).example_inputs(BATCH) for _ in range(STEPS)]


def in_float64() -> None:
    """The examples bring their logits to float32 for the loss, as one does; here everything is to stay in float64."""
    torch.Tensor.float = lambda self: self  # type: ignore[method-assign,assignment,misc]


Result = tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]


@cache
def reference(name: str, deep: bool) -> Result:
    """Losses, first gradients and final parameters of two steps in one process."""
    in_float64()
    torch.manual_seed(3)
    model = load(name, deep).build().double()
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
    loaded = load(name, plan.mesh.pp > 1)
    parallel: ParallelModel = apply(
        lambda: loaded.build().double(), plan, device="cpu", seed=3, inputs=loaded.example_inputs if plan.pipeline else None
    )
    opt, losses, gradients = optimizer(parallel.parameters()), [], {}
    for batch in batches(name):
        share = {key: value.chunk(parallel.dp_size)[parallel.dp_rank] for key, value in batch.items()}
        losses.append(parallel.step(share).item())
        gradients = gradients or gathered(parallel, {key: p.grad for key, p in parallel.module.named_parameters()})
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
    in_float64()
    wrong = []
    for title, plan in plans.items():
        try:
            errors = differences(reference(name, plan.mesh.pp > 1), parallel_run(name, plan))
            where = max(errors, key=errors.__getitem__)
            if not errors[where] < TOLERANCE[name]:
                wrong.append(f"{title}: {where} differs by {errors[where]:.1e}")
        except Exception:
            wrong.append(f"{title}: {traceback.format_exc()}")
            break  # the other ranks may wait for this one
    return wrong


def check(name: str, world: int, cases: dict[str, Case]) -> None:
    first, step = SHARES[name]
    plans = {title: plan_of(name, case) for title, case in list(cases.items())[first::step]}
    for wrong in run(world, on_rank, name, plans):
        assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("world", list(CASES))
@pytest.mark.parametrize("name", list(MODELS))
def test_the_parallel_model_computes_the_same(name: str, world: int) -> None:
    check(name, world, CASES[world])


@pytest.mark.parametrize("world", list(RINGS))
@pytest.mark.parametrize("name", ["llama", "gpt", "hf_llama"])
def test_a_ring_computes_the_same(name: str, world: int) -> None:
    plans = {title: plan_of(name, case) for title, case in RINGS[world].items()}
    for wrong in run(world, on_rank, name, plans):
        assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("world", list(PIPELINES))
@pytest.mark.parametrize("name", list(MODELS))
def test_a_pipeline_computes_the_same(name: str, world: int) -> None:
    check(name, world, PIPELINES[world])
