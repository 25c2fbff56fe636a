"""What is a layer, and the odd things that layers do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoplan.capture import capture_module
from autoplan.capture.fake import build_on_meta
from autoplan.graph import Graph


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm(x)).relu()


class Stack(nn.Module):
    """Four blocks after one linear."""

    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(self.block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.mean()


def graph(model: nn.Module, **options: Any) -> Graph:
    return capture_module(model, lambda batch: {"x": torch.randn(batch, 6, 8)}, compute_dtype="float32", **options)


def names(g: Graph) -> list[str]:
    return [op.name for op in g.outer.ops if op.kind not in ("enter", "exit")]


def test_the_same_model_is_the_same_graph() -> None:
    assert graph(Stack()) == graph(Stack())
    assert graph(Stack()).fingerprint == graph(Stack()).fingerprint


def test_blocks_of_a_sequential_stand_between_its_borders() -> None:
    class Model(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*self.layers)  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(self.first(x)).mean()

    g = graph(Model())
    assert names(g) == ["linear", *["block"] * 4, "mean"]
    assert [(op.kind, op.module) for op in g.outer.ops if op.module == "layers"] == [
        ("enter", "layers"),
        *[("call", "layers")] * 4,
        ("exit", "layers"),
    ]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("function", [checkpoint, lambda *a, **k: torch.utils.checkpoint.checkpoint(*a, **k)])
def test_the_models_own_checkpointing_is_left_out(function: Any, reentrant: bool) -> None:
    class Model(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for layer in self.layers:
                x = function(layer, x, use_reentrant=reentrant)
            return x.mean()

    g, plain = graph(Model()), graph(Stack())
    assert (g.outer, g.bodies) == (plain.outer, plain.bodies)
    assert "checkpointing" in g.warnings[0]


@pytest.mark.parametrize("start", [None, 0.0])
def test_layers_that_leave_tensors_by_a_side_door_are_no_blocks(start: float | None) -> None:
    class Leaky(Block):
        def __init__(self) -> None:
            super().__init__()
            self.aux: Any = start

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            self.aux = x.square().mean()
            return x

    class Model(Stack):
        block = Leaky

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + sum(layer.aux for layer in self.layers)

    g = graph(Model())
    assert g.blocks == ()
    assert names(g).count("square") == 4
    assert "constant" not in names(g)


def test_layers_that_differ_have_bodies_of_their_own() -> None:
    class Model(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.layers[1].norm.eps = 0.1  # type: ignore[union-attr]
            for parameter in self.layers[2].parameters():
                parameter.requires_grad = False

    g = graph(Model())
    assert [block.body for block in g.blocks] == [0, 0, 1, 0]  # eps changes no operation
    assert [p.trainable for p in g.bodies[1].parameters] == [False] * 4


def test_arguments_and_results_of_blocks_are_named_by_their_place() -> None:
    class Nested(Block):
        def forward(self, x: Tensor, state: dict[str, list[Tensor]], *, scale: Tensor, flag: bool) -> Any:  # type: ignore[override]
            return {"x": super().forward(x) * scale + state["a"][0], "state": state, "n": 3}

    class Model(Stack):
        block = Nested

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            state, scale = {"a": [x * 2, x]}, torch.ones(8)
            for layer in self.layers:
                out = layer(x, state, scale=scale, flag=True)
                x, state = out["x"], out["state"]
            return x.mean()

    g = graph(Model())
    first, later = g.bodies
    assert first.input_leaves == ("0,1.a.1", "1.a.0", "scale")
    assert later.input_leaves == ("0", "1.a.0", "1.a.1", "scale")
    exits = [op.leaf for op in later.ops if op.kind == "exit" and op.module == ""]
    assert exits == ["x", "state.a.0", "state.a.1"]
    assert len(g.blocks) == 4


def test_a_tensor_that_reaches_a_block_unseen_is_an_input_without_a_place() -> None:
    class Model(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.ones(8))
            for layer in self.layers:
                layer.root = [self]  # type: ignore[assignment]

    class Reaches(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.root[0].bias  # type: ignore[index,operator]

    Model.block = Reaches
    g = graph(Model())
    assert [body.input_leaves for body in g.bodies] == [("0", "")]
    calls = [op for op in g.outer.ops if op.kind == "call"]
    assert {g.outer.values[op.inputs[1]].parameter for op in calls} == {"bias"}


def test_custom_functions_are_one_opaque_operation() -> None:
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.saved_tensors[0].cos()

    class Model(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return Sine.apply(self.first(x)).mean()

    g = graph(Model())
    (op,) = [op for op in g.outer.ops if op.name == "Sine"]
    assert (op.kind, op.forward_kernels, op.backward_kernels) == ("opaque", 1, 2)
    assert g.outer.values[op.outputs[0]].requires_grad
    assert len(op.saved) == 1


def test_in_place_calls_make_new_values_of_the_same_memory() -> None:
    class Model(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).clone()
            x += 1
            x[:, 0] = 0
            return x.mean()

    g = graph(Model())
    ops = {op.name: op for op in g.outer.ops}
    assert ops["setitem"].inputs == ops["add_"].outputs
    assert ops["mean"].inputs == ops["setitem"].outputs
    assert {g.outer.values[ops[n].outputs[0]].storage for n in ("clone", "add_", "setitem")} == {ops["clone"].outputs[0]}


def test_unused_layers_and_parameters_are_kept() -> None:
    class Model(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for layer in self.layers[:3]:
                x = layer(x)
            return x.mean()

    g = graph(Model())
    assert len(g.blocks) == 3
    assert g.parameters == sum(p.numel() for p in Stack().parameters())
    assert "layers.3.fc.weight" in {p.name for p in g.outer.parameters}


def test_layers_that_share_a_parameter_with_the_rest_are_no_blocks() -> None:
    class Model(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 8)
            self.last.weight = self.layers[3].fc.weight  # type: ignore[union-attr]

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for layer in self.layers:
                x = layer(x)
            return self.last(x).mean()

    g = graph(Model())
    assert [block.name for block in g.blocks] == ["layers.0", "layers.1", "layers.2"]
    assert g.tied == (("layers.3.fc.weight", "last.weight"),)
    assert g.parameters == sum(p.numel() for p in Model().parameters())


def test_a_model_that_looks_at_values_while_it_is_built_gets_no_memory_all_the_same() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
            self.fc = nn.Linear(10_000, 10_000)

    built = build_on_meta(Model)
    assert built.fc.weight.is_meta  # type: ignore[union-attr]
    assert built.rates == pytest.approx([0, 0.05, 0.1])


def test_a_compiled_model_is_taken_as_it_was() -> None:
    assert graph(torch.compile(Stack())).outer == graph(Stack()).outer  # type: ignore[arg-type]
