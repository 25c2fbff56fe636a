"""The recording is the program: run on real tensors it gives the same loss, gradients and FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoplan.adapt import adapt
from autoplan.capture.fx import capture_fx, readable
from autoplan.capture.model import loss_of
from tests.capture.models import real, tiny
from tests.models import ZOO


def run(call: Any, seed: int = 0) -> tuple[torch.Tensor, int]:
    torch.manual_seed(seed)
    with FlopCounterMode(display=False) as counter:
        loss = call()
    return loss, counter.get_total_flops()


@pytest.mark.parametrize("name", list(ZOO))
@pytest.mark.filterwarnings("ignore")
def test_the_recorded_calls_compute_the_same_loss_and_gradients(name: str) -> None:
    loaded = ZOO[name].load()
    torch.manual_seed(0)
    module = loaded.build().to(torch.bfloat16).train()
    adapt(module)
    inputs = loaded.example_inputs(2)
    inputs = {key: _cast(value) for key, value in inputs.items()}
    recorded = capture_fx(module, lambda batch: inputs, loaded.loss_fn)

    eager, flops = run(lambda: loss_of(module(**inputs), inputs, loaded.loss_fn, name))
    eager.backward()
    wanted = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    given = dict(_named(inputs))
    places = [str(node.target) for node in recorded.graph.nodes if node.op == "placeholder"]
    loss, counted = run(lambda: recorded(**{place: given[place] for place in places}))
    loss.backward()

    assert loss.item() == eager.item()
    assert counted == flops
    for n, p in module.named_parameters():
        assert (p.grad is None) == (n not in wanted), n
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[n], msg=n)


def _cast(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _named(tree: Any, path: str = "") -> list[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        return [(path, tree)]
    items = tree.items() if isinstance(tree, dict) else vars(tree).items() if hasattr(tree, "__dict__") else ()
    return [pair for key, item in items for pair in _named(item, f"{path}_{key}" if path else key)]


def test_blocks_are_graphs_of_their_own_over_the_users_parameters() -> None:
    module = real(tiny("gpt"))
    recorded = capture_fx(module, tiny("gpt").example_inputs, compute_dtype="float32")
    blocks = [str(node.target) for node in recorded.graph.nodes if node.op == "call_module"]
    assert blocks == ["h.0", "h.1", "h.2"]
    names = dict(module.named_parameters())
    assert all(parameter is names[name] for name, parameter in recorded.named_parameters())
    assert {name for name, _ in recorded.named_parameters()} == set(names)


def test_nodes_tell_module_flops_and_saved_bytes() -> None:
    loaded = tiny("gpt")
    recorded = capture_fx(real(loaded), loaded.example_inputs, compute_dtype="float32")
    block = recorded.get_submodule("h.0")
    linears = [n for n in block.graph.nodes if n.meta.get("fqn", "").endswith("c_fc")]  # type: ignore[union-attr]
    assert len(linears) == 1
    assert linears[0].meta["flops"] == (2 * 2 * 16 * 32 * 64, 2 * 2 * 2 * 16 * 32 * 64)
    assert linears[0].meta["saved"] == 2 * 16 * 32 * 4
    assert tuple(linears[0].meta["val"].shape) == (2, 16, 64)


def test_the_graphs_as_text() -> None:
    text = readable(tiny("gpt"))
    assert text.count("def forward") == 2
    assert "# h.0 and 2 like it" in text


def test_attributes_that_are_tensors(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.scale = torch.tensor(3.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.fc(x) * self.scale).sum()

    module, x = Scaled(), torch.randn(2, 4)
    recorded = capture_fx(module, lambda batch: {"x": x}, compute_dtype="float32")
    assert recorded(x=x) == module(x)
