"""Layers that look equal and are not; gradients that meet; mixed precision; samples that meet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoplan.capture import capture_module
from autoplan.capture.model import record
from autoplan.capture.record import Options
from autoplan.graph import Graph
from tests.models import ZOO


class Secret:
    """Something that no signature looks into."""

    def __init__(self, steep: bool) -> None:
        self.steep = steep


class Block(nn.Module):
    def __init__(self, steep: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.secret = Secret(steep)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc(x)
        return x.relu() if self.secret.steep else x.tanh()


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.float().mean()


def graph(model: nn.Module, **options: Any) -> Graph:
    return capture_module(model, lambda batch: {"x": torch.randn(batch, 6, 8)}, **{"compute_dtype": "float32", **options})


@pytest.mark.parametrize("kinds", [[True, False, True, False, False], [False, True, True, True]])
def test_layers_that_look_equal_and_differ_are_traced_one_by_one(kinds: list[bool]) -> None:
    model = Stack([Block(steep) for steep in kinds])
    g = graph(model)
    ran = [{op.name for op in g.bodies[block.body].ops} & {"relu", "tanh"} for block in g.blocks]
    assert ran == [{"relu"} if steep else {"tanh"} for steep in kinds]
    assert len(g.bodies) == 2
    assert g == graph(model, stubs=False)
    (warning,) = g.warnings
    assert "layers.0 and layers.1 look equal but differ at" in warning
    assert "test_twins.py:" in warning


def test_a_layer_whose_result_is_not_used_costs_no_backward() -> None:
    class Early(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            states = [x]
            for layer in self.layers:
                states.append(layer(states[-1]))
            return states[-2].mean()

    g = graph(Early([Block(True) for _ in range(5)]))
    costs = [g.bodies[block.body].total("backward_flops").at(1) for block in g.blocks]
    assert costs == [costs[0]] * 4 + [0]
    assert costs[0] > 0
    assert g == graph(Early([Block(True) for _ in range(5)]), stubs=False)


def test_hooks_of_layers_that_are_not_run_are() -> None:
    model, seen = Stack([Block(True) for _ in range(4)]), []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[arg-type]
    graph(model)
    assert len(seen) == 2 * 4


@pytest.mark.parametrize("name", ["nn.Transformer", "t5", "gpt"])
@pytest.mark.parametrize("stubs", [True, False])
def test_gradients_are_added_up_as_often_as_the_engine_does(name: str, stubs: bool) -> None:
    loaded = ZOO[name].load()
    _, (recorder,) = record(loaded.build(), loaded.example_inputs, loaded.loss_fn, name, "bfloat16", (2,), Options(stubs=stubs))
    assert recorder.meetings == recorder.added.bytes > 0


def test_autocast_computes_what_cuda_would() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                x = self.fc(x)
                return F.cross_entropy(self.norm(x).flatten(0, 1), torch.zeros(x.shape[0] * 6, dtype=torch.int64))

    g = graph(Mixed())
    made = {op.name: g.outer.values[op.outputs[0]].dtype for op in g.outer.ops if op.kind not in ("enter", "exit")}
    assert made["linear"] == "bfloat16"
    assert made["layer_norm"] == "float32"
    assert made["cross_entropy"] == "float32"


def test_pairs_of_samples_are_priced_high_and_said() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(48, 48)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x.flatten(1))
            return F.cross_entropy(x @ x.t(), torch.arange(x.shape[0]))

    g = graph(Pairs())
    (op,) = [op for op in g.outer.ops if op.name == "matmul"]
    assert op.kind == "opaque"
    for batch in (2, 100, 1024):
        assert op.forward_flops.at(batch) >= 2 * 48 * batch**2
    assert op.forward_flops.at(1024) == 2 * 48 * 1024**2
    (warning,) = g.warnings
    assert "samples meet each other at" in warning


def test_lists_with_a_tensor_for_each_sample() -> None:
    class Listed(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(list(self.first(x).unbind(0)), dim=0).mean()

    g = graph(Listed([]))
    ops = {op.name: op for op in g.outer.ops}
    (part,) = ops["unbind"].outputs
    value = g.outer.values[part]
    assert (value.shape, value.batch_dim) == ((6, 8), 0)
    assert ops["cat"].inputs == (part,)
    assert {ops["unbind"].kind, ops["cat"].kind} == {"opaque"}
