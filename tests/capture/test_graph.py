"""The graph of the four examples: structure, costs, saved memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoplan.capture import capture, capture_module
from autoplan.errors import UsageError
from autoplan.graph import Body, Graph
from tests.capture.models import TINY, loss_of, real, tiny

NAMES = list(TINY)


@functools.cache
def graph(name: str, stubs: bool = True, dtype: str = "bfloat16") -> Graph:
    return capture(tiny(name), compute_dtype=dtype, stubs=stubs)


def bodies(g: Graph) -> list[Body]:
    return [g.outer, *g.bodies]


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("name", NAMES)
def test_flops_equal_those_that_torch_counts_in_a_real_run(name: str, batch: int) -> None:
    loaded = tiny(name)
    with FlopCounterMode(display=False) as counter:
        loss_of(real(loaded), loaded.example_inputs(batch)).backward()
    g = graph(name, dtype="float32")
    attention = [op for _, body in g.members() for op in body.ops if op.kind == "attention"]
    by_kernel = sum((op.forward_flops + op.backward_flops).at(batch) for op in attention)
    heads, length, width = 4, 16, 8
    assert by_kernel == len(attention) * 14 * batch * heads * length**2 * width  # torch counts none of its CPU kernel
    total = g.total("forward_flops") + g.total("backward_flops")
    assert total.at(batch) - by_kernel == counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_equal_layers_share_a_body_and_cost_what_they_cost_one_by_one(name: str) -> None:
    short, full = graph(name), graph(name, stubs=False)
    assert [block.name for block in short.blocks] == [block.name for block in full.blocks]
    assert len(short.bodies) == (2 if name == "transformer" else 1)
    assert len(short.blocks) == 3 * len(short.bodies)
    for what in ("forward_flops", "backward_flops", "forward_bytes"):
        assert short.total(what) == full.total(what)
    assert short.total("backward_bytes").at(4) == pytest.approx(full.total("backward_bytes").at(4), rel=0.01)
    assert short.saved_bytes == full.saved_bytes
    assert short.parameters == full.parameters == sum(p.numel() for p in tiny(name).build().parameters())


@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_made_once_and_before_its_use(name: str) -> None:
    for body in bodies(graph(name)):
        known = set(body.inputs) | {v.id for v in body.values if v.parameter is not None}
        for op in body.ops:
            assert known.issuperset(op.inputs), op
            assert known.isdisjoint(op.outputs), op
            known.update(op.outputs)
            assert all(value in known for value in op.saved), op
        assert known.issuperset(body.outputs)
        assert len(known) == len(body.values)
        names = {parameter.name for parameter in body.parameters}
        assert {v.parameter for v in body.values if v.parameter is not None} <= names


@pytest.mark.parametrize("name", NAMES)
def test_borders_nest(name: str) -> None:
    for body in bodies(graph(name)):
        outermost = "" if body is not graph(name).outer else None
        home: dict[int, str | None] = dict.fromkeys(body.inputs)
        for op in body.ops:
            for i in op.inputs:
                if body.values[i].parameter is not None:
                    continue
                inside = home[i]
                if op.kind == "enter":  # from the module around it
                    assert inside is None or inside in _around(op.module), op
                elif op.kind == "exit":
                    assert inside == op.module or inside in _around(op.module), op
                else:
                    assert inside is None or inside in [op.module, *_around(op.module)], op
            for i in op.outputs:
                left = op.module.rpartition(".")[0] if op.module else outermost
                home[i] = _called_from(op.module, left, body) if op.kind == "exit" else op.module
        assert all(
            body.values[o.outputs[0]].storage == body.values[o.inputs[0]].storage for o in body.ops if o.kind in ("enter", "exit")
        )


def _around(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))] if module else []


def _called_from(module: str, parent: str | None, body: Body) -> str | None:
    """The nearest module around `module` that runs (containers such as ModuleList do not)."""
    running = {op.module for op in body.ops if op.kind == "enter"} | {""}
    while parent and parent not in running:
        parent = parent.rpartition(".")[0]
    return parent


@pytest.mark.parametrize("name", NAMES)
def test_calls_fit_the_bodies(name: str) -> None:
    g = graph(name)
    calls = [op for op in g.outer.ops if op.kind == "call"]
    assert [op.block for op in calls] == list(range(len(g.blocks)))
    for op in calls:
        body = g.bodies[g.blocks[op.block].body]
        for outside, inside in ((op.inputs, body.inputs), (op.outputs, body.outputs)):
            pairs = [(g.outer.values[a], body.values[b]) for a, b in zip(outside, inside, strict=True)]
            assert all((a.shape, a.dtype, a.batch_dim) == (b.shape, b.dtype, b.batch_dim) for a, b in pairs)
        assert len(body.input_leaves) == len(body.inputs)
        entered = [o for o in body.ops if o.kind == "enter" and o.module == ""]
        assert {o.leaf for o in entered} == set(body.input_leaves) - {""}
        assert [o.outputs[0] for o in body.ops if o.kind == "exit" and o.module == ""] == list(body.outputs)


@pytest.mark.parametrize("name", NAMES)
def test_no_operation_of_a_layer_is_opaque(name: str) -> None:
    for body in graph(name).bodies:
        assert [op.name for op in body.ops if op.kind == "opaque"] == []


def saved_in_a_real_run(module: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    sizes: dict[int, int] = {}
    alive = []
    fixed = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), *inputs.values())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            alive.append(tensor)
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(module, inputs)
    assert loss.requires_grad
    return sum(sizes.values())


class Plain(nn.Module):
    """A feed-forward network, whose kernels are the same on every device."""

    def __init__(self) -> None:
        super().__init__()
        layer = lambda: nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 16))  # noqa: E731
        self.layers = nn.ModuleList(layer() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.square().mean()


def test_saved_bytes_equal_those_of_a_real_run() -> None:
    module = Plain()
    inputs = {"x": torch.randn(6, 10, 16)}
    g = capture_module(module, lambda batch: {"x": torch.randn(batch, 10, 16)}, compute_dtype="float32")
    assert sum(body.saved.at(6) for _, body in g.members()) == saved_in_a_real_run(module, inputs)
    assert len(g.bodies) == 2  # the first layer's input needs no gradient


def test_a_gpt_layer_keeps_34_sbh_as_megatron_says() -> None:
    s, h, heads = 256, 128, 4
    loaded = tiny("gpt", hidden=str(h), heads=str(heads), ffn=str(4 * h), seq_len=str(s), dropout="0.1")
    body = capture(loaded).bodies[0]
    statistics = 4 * s * heads + 2 * 2 * 2 * s  # flash logsumexp; mean and rstd of two norms (as the CPU keeps them)
    assert body.saved.per_sample == 34 * s * h + statistics
    assert body.saved.fixed == 24  # the state of the random number generator


def test_llama_405b_is_one_body_of_126_blocks() -> None:
    g = capture(tiny("llama", **{k: str(v) for k, v in _LLAMA_405B.items()}))
    assert len(g.blocks) == 126
    assert len(g.bodies) == 1
    assert g.parameters == pytest.approx(405.85e9, rel=1e-3)
    tokens = 8192
    body = g.bodies[0]
    n = sum(p.numel for p in body.parameters)
    assert body.total("forward_flops").at(1) == pytest.approx(2 * n * tokens + 4 * tokens**2 * 16384, rel=1e-4)


_LLAMA_405B = {"layers": 126, "hidden": 16384, "heads": 128, "kv_heads": 8, "ffn": 53248, "vocab": 128256, "seq_len": 8192}


def test_tied_parameters_have_one_name() -> None:
    g = graph("gpt")
    assert g.tied == (("wte.weight", "lm_head.weight"),)
    names = [p.name for p in g.outer.parameters]
    assert "wte.weight" in names
    assert "lm_head.weight" not in names


def test_a_layer_that_runs_twice_is_no_block() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                for layer in self.layers:
                    x = layer(x)
            return x.sum()

    g = capture_module(Shared(), lambda batch: {"x": torch.randn(batch, 4)}, compute_dtype="float32")
    assert g.blocks == ()
    assert sum(op.kind == "linear" for op in g.outer.ops) == 4


def test_the_users_module_is_not_touched() -> None:
    module = tiny("transformer").build()
    before = {name: (p.data_ptr(), p.dtype) for name, p in module.named_parameters()}
    forwards = [m.forward.__func__ for m in module.modules()]
    capture_module(module, tiny("transformer").example_inputs)
    assert before == {name: (p.data_ptr(), p.dtype) for name, p in module.named_parameters()}
    assert forwards == [m.forward.__func__ for m in module.modules()]


def failing() -> Iterator[tuple[str, nn.Module, str]]:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

    class Size(Odd):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.fc(x), self.fc.weight[:1]]).sum()

    class NoLoss(Odd):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.fc(x),)

    class Wide(Odd):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    class Raises(Odd):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.view(-1, 3)).sum()

    class Frozen(Odd):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).detach().sum()

    class Rows(Odd):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x[x[:, 0] > 0]).sum()

    class Program(Odd):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.fc(x) if len(x) == 2 else self.fc(self.fc(x))).sum()

    yield "proportional", Size(), "test_graph.py:"
    yield "no loss", NoLoss(), "loss_fn"
    yield "shape", Wide(), "loss_fn"
    yield "RuntimeError", Raises(), "test_graph.py:"
    yield "no gradient", Frozen(), "requires_grad"
    yield "depends on the values", Rows(), "test_graph.py:"
    yield "for a batch of 3", Program(), "batch"


@pytest.mark.parametrize(("what", "module", "also"), list(failing()), ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_what_capture_cannot_follow_is_said(what: str, module: nn.Module, also: str) -> None:
    with pytest.raises(UsageError) as error:
        capture_module(module, lambda batch: {"x": torch.randn(batch, 4)}, compute_dtype="float32")
    assert what in str(error.value)
    assert also in str(error.value)


def test_guesses_about_values_are_warned_of() -> None:
    class Checks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.isnan(x).any():
                raise ValueError("NaN")
            return self.fc(x).sum()

    g = capture_module(Checks(), lambda batch: {"x": torch.randn(batch, 4)})
    assert len(g.warnings) == 1
    assert "test_graph.py:" in g.warnings[0]
