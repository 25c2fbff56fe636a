"""A backward pass in two parts: the first makes no gradients of linears' weights, both together what autograd makes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from autoplan.apply import selective
from autoplan.apply.split import Later, splitting


class Block(nn.Module):
    """A tied weight, a weight that is made of a parameter, a norm, an input without gradient, writing in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 6, bias=False), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.norm(x))
        y *= 2
        y = F.linear(torch.tanh(y), self.down.weight)
        y = y + F.linear(y, self.up.weight[:6])
        return F.linear(F.linear(y, self.up.weight), self.down.weight)


def gradients(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


WAYS = {
    "plain": lambda function, x: function(x),
    "again": partial(checkpoint, use_reentrant=False),
    "selective": selective.run,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("needed", [True, False])
def test_both_parts_together_are_the_whole(way: str, needed: bool) -> None:
    torch.manual_seed(0)
    module, x = Block().double(), torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=needed)
    module(x).square().sum().backward()
    expected, passed = gradients(module), x.grad
    module.zero_grad()
    x.grad = None

    def split(x: torch.Tensor) -> torch.Tensor:
        with splitting(True):
            return module(x)  # type: ignore[no-any-return]

    later = Later()
    loss = WAYS[way](split, x).square().sum()
    with later:
        loss.backward()
    assert module.down.weight.grad is None
    assert module.norm.weight.grad is not None
    assert len(later.products) == 4
    for product in later.products:
        product.add()
    assert (x.grad is None) == (passed is None)
    assert passed is None or torch.allclose(x.grad, passed, rtol=1e-12)
    for name, gradient in gradients(module).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-12), name


def test_without_a_later_nothing_is_left() -> None:
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    module(x).sum().backward()
    expected = gradients(module)
    module.zero_grad()
    with splitting(True):
        made = module(x)
        with torch.no_grad():
            assert not module(x).requires_grad
    made.sum().backward()
    assert all(torch.allclose(gradient, expected[name]) for name, gradient in gradients(module).items())
