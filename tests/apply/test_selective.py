"""Selective recomputation: what runs again and what doesn't, random numbers, writes in place; the same results on real ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from autoplan.apply import selective
from autoplan.apply._torch import KEPT, TorchDispatchMode, memory_of, tree_leaves
from autoplan.strategy import REPLICATE, Layout, Mesh
from autoplan.verify.dry import one_rank
from tests import test_parity
from tests.apply.models import GPTBlock
from tests.apply.ranks import run
from tests.test_parity import SEQUENCE, Case


class Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.found[func] += 1
        return func(*args, **kwargs or {})


def gradients(layer: nn.Module, x: torch.Tensor, how: str) -> tuple[list[torch.Tensor], Counter[Any]]:
    """Of the layer's parameters and input, with the operations that ran."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    run_layer = {"none": lambda: layer(x), "selective": lambda: selective.run(layer, x)}
    with Calls() as calls:
        y = run_layer.get(how, lambda: checkpoint(layer, x, use_reentrant=False))()
        found = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    return list(found), calls.found


class InPlace(nn.Module):
    """Writes into what a product has made; `F.linear` does so itself with a bias, where its input isn't contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x.transpose(0, 1)).transpose(0, 1)
        z = self.second(F.gelu(y))
        z += 1.0
        z.mul_(2.0)
        return self.third(z.sigmoid()) + x


class Bare(nn.Module):
    """What it returns is a product's result, which is needed again and which its caller writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, z = self.inner(x)
        y += 1.0
        return y + z


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.first(x)
        return y, self.second(y.sigmoid())


LAYERS = {"gpt": (lambda: GPTBlock(0.0), 32), "dropout": (lambda: GPTBlock(0.3), 32), "in place": (InPlace, 8)}


@pytest.mark.parametrize("name", list(LAYERS))
def test_gradients_are_those_of_the_layer_as_it_is(name: str) -> None:
    torch.manual_seed(0)
    build, width = LAYERS[name]
    layer, x = build().double(), torch.randn(3, 16, width, dtype=torch.float64)
    expected, _ = gradients(layer, x, "none")
    for how in ("selective", "full"):
        found, _ = gradients(layer, x, how)
        assert all(map(torch.equal, expected, found)), how


def test_a_caller_may_write_into_what_a_layer_returns() -> None:
    torch.manual_seed(0)
    layer, x = Bare().double(), torch.randn(3, 16, 8, dtype=torch.float64)
    expected, _ = gradients(layer, x, "none")
    inner = layer.inner.forward
    layer.inner.forward = lambda x: selective.run(inner, x)  # type: ignore[method-assign]
    found, _ = gradients(layer, x, "none")
    assert all(map(torch.equal, expected, found))


def test_products_and_attention_run_once() -> None:
    torch.manual_seed(0)
    layer, x = GPTBlock(0.0), torch.randn(3, 16, 32)
    counts = {how: gradients(layer, x, how)[1] for how in ("none", "selective", "full")}
    for func in KEPT:
        assert counts["selective"][func] == counts["none"][func], func
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert counts["full"][attention] == 2 * counts["none"][attention] == 2
    norm = torch.ops.aten.native_layer_norm.default
    assert counts["selective"][norm] == counts["full"][norm] == 2 * counts["none"][norm]


def test_what_is_kept_is_let_go_when_the_layer_has_run_again() -> None:
    """The last product's result is kept, but the backward pass has no use for it."""
    forward, again = selective.contexts()
    layer, x = nn.Linear(4, 4, bias=False), torch.randn(2, 4, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False, context_fn=lambda: (forward, again))
    results = forward._results
    assert [len(queue) for queue in results.values()] == [1]
    y.sum().backward()
    assert not results


def test_a_second_backward_pass_runs_everything_again() -> None:
    torch.manual_seed(0)
    layer, x = GPTBlock(0.0), torch.randn(3, 16, 32, requires_grad=True)
    y = selective.run(layer, x).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x)[0])


@pytest.mark.parametrize("stream", [REPLICATE, SEQUENCE], ids=str)
def test_partial_sums_are_not_kept_beside_what_they_come_to(stream: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer keeps what its cost says, to the byte but for attention's statistics."""
    plan = test_parity.plan_of("llama", Case(Mesh(tp=2), 8, stream, "selective"))
    kept: list[float] = []
    end = selective.Keeping.end

    def counted(mode: selective.Keeping, returned: Any) -> None:
        end(mode, returned)
        results = [result._result for queue in mode._results.values() for result in queue if result._make is None]
        memories = {
            memory_of(t): local(t).untyped_storage().nbytes() for t in tree_leaves(results) if isinstance(t, torch.Tensor)
        }
        kept.append(sum(memories.values()))

    monkeypatch.setattr(selective.Keeping, "end", counted)
    one_rank(plan, test_parity.load("llama"), 0)
    costs = test_parity.tables("llama", False).costs
    said = costs.layer_cost(0, next(plan.layers())[1].sharding, 2, 8).kept.results
    assert said == pytest.approx(kept[0], rel=0.03)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


CASES: dict[str, Case] = {
    "tp + sp x fsdp": Case(Mesh(dp_shard=2, tp=2), 2, SEQUENCE, "selective"),
    "tp x dp, zero 1": Case(Mesh(dp_replicate=2, tp=2), 1, recompute="selective"),
    "cp x fsdp": Case(Mesh(dp_shard=2, cp=2), 2, recompute="selective", zero=2),
    "pp, tp + sp, interleaved": Case(Mesh(pp=2, tp=2), 2, SEQUENCE, "selective", 3, "interleaved-1f1b", 2),
    "pp, fsdp, gpipe": Case(Mesh(pp=2, dp_shard=2), 2, REPLICATE, "selective", 2, "gpipe"),
}


@pytest.mark.gloo
@pytest.mark.parametrize(("name", "first"), [("llama", 0), ("gpt", 1), ("transformer", 0)])
def test_the_parallel_model_computes_the_same(name: str, first: int) -> None:
    plans = {title: test_parity.plan_of(name, case) for title, case in list(CASES.items())[first::2]}
    for wrong in run(4, test_parity.on_rank, name, plans):
        assert not wrong, "\n".join(wrong)
