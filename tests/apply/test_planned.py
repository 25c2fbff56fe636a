"""Every sharding that the planner may choose for the examples runs, and equals the single process."""

from __future__ import annotations

import os
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch

from autoplan.api import inspect, load_hardware, load_model
from autoplan.apply import apply
from autoplan.apply.checkpoint import gathered
from autoplan.cost.model import OUTER, CostModel
from autoplan.cost.rules import BORDER_COLLECTIVES
from autoplan.search.columns import Tables
from autoplan.strategy import Mesh, Within
from autoplan.workload import Workload
from tests.apply.plans import make
from tests.apply.ranks import run
from tests.apply.traffic import Traffic

pytestmark = pytest.mark.gloo

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {"layers": 2, "hidden": 32, "heads": 4, "vocab": 64, "seq_len": 16, "ffn": 64}
CHANGES = {
    "llama": {**TINY, "kv_heads": 2, "size": "125M"},
    "gpt": {**TINY, "size": "124M"},
    "hf_llama": {**TINY, "kv_heads": 2, "size": "1B"},
    "transformer": {**TINY, "dropout": 0.0},
}
MOST = int(os.environ.get("MOST", "8"))
"""Shardings that are tried of each model and stream (MOST=1000: all of them)."""


def shardings(name, tp):
    """(stream, graph, {body: sharding}), spread over all that the search weighs."""
    loaded = load(name)
    graph = inspect(loaded, compute_dtype="bfloat16")
    tables = Tables(CostModel(graph, load_hardware("h100-sxm-8x"), Workload(global_batch=4)))
    for stream in tables.streams(tp):
        lists = {g: tables.shardings(g, Within(tp), 4, stream) for g in tables.classes}
        if not all(lists.values()):
            continue
        count = min(max(map(len, lists.values())), MOST)
        step = {g: max(1, len(found) // count) for g, found in lists.items()}
        for i in range(count):
            yield str(stream), graph, {g: found[i * step[g] % len(found)] for g, found in lists.items()}


def load(name):
    return load_model(str(EXAMPLES / f"{name}.py"), **{key: str(value) for key, value in CHANGES[name].items()})


def plan_of(graph, chosen, mesh):
    layers = {block.name: chosen[block.body] for block in graph.blocks}
    return make(layers, chosen[OUTER], mesh, batch=4)


def try_all(name, cases, mesh, batch, expected_loss, expected):
    torch.Tensor.float = lambda self: self  # the examples compute their loss in float32; here all is float64
    failures = []
    for i, (stream, graph, chosen) in enumerate(cases):
        try:
            parallel = apply(lambda: load(name).build().double(), plan_of(graph, chosen, mesh), device="cpu", seed=3)
            share = {key: value.chunk(parallel.dp_size)[parallel.dp_rank] for key, value in batch.items()}
            with Traffic() as forward:
                loss = parallel._loss(share)
            with Traffic() as backward:
                loss.backward()
            loss = loss.item()
            check_traffic(parallel, forward.found, backward.found)
            scale = max(value.abs().max().item() for value in expected.values())
            found = gathered(parallel, {key: p.grad for key, p in parallel.module.named_parameters()})
            worst, where = max(((grad - expected[key]).abs().max().item() / scale, key) for key, grad in found.items())
            tolerance = 2e-6 if name == "hf_llama" else 1e-10
            assert abs(loss - expected_loss) < tolerance * 10, (loss, expected_loss)
            assert worst < tolerance, (worst, where)
        except Exception as error:
            if "Connection closed" in str(error):
                raise
            failures.append(f"{name} {i} stream {stream}\n{traceback.format_exc()}\n{chosen}")
    return len(cases), failures


def check_traffic(parallel, forward, backward):
    """Each border costs what the table says, each GATHERED parameter one all_reduce, a vocabulary-parallel loss two; no more."""
    wanted = Counter(), Counter()
    for strategy in (parallel.plan.outer_strategy, *(strategy for _, strategy in parallel.plan.layers())):
        for border in strategy.sharding.borders:
            for count, kind in zip(wanted, BORDER_COLLECTIVES[border.source.kind, border.target.kind], strict=True):
                count[kind] += kind is not None
        wanted[1]["all_reduce"] += sum(layout.kind == "gathered" for _, layout in strategy.sharding.parameters)
    loss = {"all_reduce": 2}
    assert dict(+wanted[0]) in (forward, dict(Counter(forward) - Counter(loss))), ("forward", dict(+wanted[0]), forward)
    assert dict(+wanted[1]) == backward, ("backward", dict(+wanted[1]), backward)


@pytest.mark.parametrize("name", list(CHANGES))
def test_every_planned_sharding_runs(name):
    cases = list(shardings(name, 2))
    batch = load(name).example_inputs(4)
    torch.manual_seed(3)
    reference = load(name).build()
    single = torch.Tensor.float
    torch.Tensor.float = lambda self: self
    try:
        reference = reference.double()
        loss = reference(**batch)
        loss = loss if isinstance(loss, torch.Tensor) else loss.loss
        loss.backward()
    finally:
        torch.Tensor.float = single
    expected = {key: p.grad for key, p in reference.named_parameters()}
    count, failures = run(2, try_all, name, cases, Mesh(tp=2), batch, loss.item(), expected)[0]
    assert not failures, f"{len(failures)} of {count} failed\n" + "\n".join(failures[:3])
