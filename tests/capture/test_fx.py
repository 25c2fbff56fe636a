"""The executable graphs. That they compute the same as the model is checked for every family in `test_zoo`."""

from __future__ import annotations

import torch
from torch import nn

from autoplan.capture.fx import capture_fx, readable
from tests.capture.models import real, tiny


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


def test_attributes_that_are_tensors() -> None:
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
