"""Full recomputation stops where PyTorch stops: what runs again is counted on real layers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from autoplan.capture import capture_module, load_model
from autoplan.cost.layer import layer_cost
from autoplan.cost.model import CostModel
from autoplan.graph import Graph
from autoplan.strategy import UNSHARDED, Mesh, Strategy
from autoplan.workload import Workload
from tests.apply.test_selective import Calls
from tests.hardware import machine

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 96, "vocab": 32, "seq_len": 16}
PRODUCTS = ("mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu")


def captured(file: str, **sizes: float) -> tuple[nn.Module, Graph]:
    loaded = load_model(str(EXAMPLES / file), kwargs={**SMALL, **sizes})
    module = loaded.build()
    return module, capture_module(module, loaded.example_inputs, loaded.loss_fn, name=file)


def counted(block: nn.Module, rest: tuple[torch.Tensor, ...], again: bool) -> Counter[str]:
    x = torch.randn(2, SMALL["seq_len"], SMALL["hidden"], requires_grad=True)
    with Calls() as calls:
        y = checkpoint(block, x, *rest, use_reentrant=False) if again else block(x, *rest)
        y.sum().backward()
    names = {func: func.overloadpacket.__name__ for func in calls.found}
    return Counter({name: calls.found[func] for func, name in names.items() if name in PRODUCTS})


@pytest.mark.parametrize(
    ("file", "sizes", "left"),
    [("llama.py", {"kv_heads": 2}, 1), ("gpt.py", {"dropout": 0.0}, 1), ("gpt.py", {"dropout": 0.1}, 0)],
    ids=["llama", "gpt", "gpt with dropout"],
)
def test_what_runs_again_is_what_pytorch_runs_again(file: str, sizes: dict[str, float], left: int) -> None:
    """The last product of a layer does not, but where dropout follows, which saves what it makes."""
    module, graph = captured(file, **sizes)
    block = module.layers[0] if file == "llama.py" else module.h[0]
    rest = (torch.randn(16, 16),) * 2 if file == "llama.py" else ()
    more = counted(block, rest, True) - counted(block, rest, False)
    linears = [index for index, op in enumerate(graph.bodies[0].ops) if op.kind == "linear"]
    assert sum(index >= graph.bodies[0].rerun for index in linears) == left
    assert more["mm"] + more["addmm"] == len(linears) - left > 2


def test_seconds_of_it_are_those_of_the_operations_before_the_last_that_saves() -> None:
    _, graph = captured("llama.py", kv_heads=4, hidden=512, ffn=2048, seq_len=256)
    costs, body = CostModel(graph, machine(), Workload(global_batch=4)), graph.bodies[0]
    model = costs.layer_model(0, 1, 4)
    whole = layer_cost(model, UNSHARDED)
    before = layer_cost(model, UNSHARDED, lambda step: step.index < body.rerun)
    assert whole.rerun == pytest.approx(before.forward)
    assert 0.5 * whole.forward < whole.rerun < 0.9 * whole.forward
    mesh, plain = Mesh(), Strategy()
    times = [costs.predict(mesh, 4, plain, [(0, Strategy(recompute=how))] * 2).step_time for how in ("none", "full")]  # type: ignore[arg-type]
    assert times[1] - times[0] == pytest.approx(2 * whole.rerun)
