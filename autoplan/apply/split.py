"""The backward pass in two parts, for the zero-bubble schedule: gradients of inputs at once, those of weights later.

Only `F.linear` by a parameter is split, where half of the work is the weight's gradient. While `splitting` is on, a mode puts
`_Product` in its place, which computes the same; its backward pass leaves to a `Later` what the weight's gradient is made of: the
product's input and its output's gradient. All else has its backward pass at once, and the graph is freed, with all that is
not needed any more. `torch.distributed.pipelining` awaits just this of a `dw_builder`; what it does without one keeps the whole
graph until then, and would recompute a layer once for every weight.

Everything works on DTensors as on tensors: the formulas are autograd's own, so that they redistribute alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

_active = threading.local()


class Product(NamedTuple):
    """What the gradient of a weight is made of."""

    weight: nn.Parameter
    input: torch.Tensor
    gradient: torch.Tensor

    @torch.no_grad()
    def add(self) -> None:
        """Add it to the weight's gradient."""
        found = _rows(self.gradient).t().mm(_rows(self.input))
        if self.weight.grad is None:
            self.weight.grad = found
        else:
            self.weight.grad += found


class Later:
    """Collects, while it is on, what backward passes leave; any thread may run them, as autograd has its own."""

    on: Later | None = None

    def __init__(self) -> None:
        self.products: list[Product] = []

    def __enter__(self) -> Later:
        Later.on = self
        return self

    def __exit__(self, *error: Any) -> None:
        Later.on = None


@contextmanager
def splitting(wanted: bool) -> Iterator[None]:
    """Run a forward pass with products that can be split, once however often it is asked for (a recomputed block asks again)."""
    if not wanted or getattr(_active, "on", False):
        yield
        return
    _active.on = True
    try:
        with _Splitting():
            yield
    finally:
        _active.on = False


class _Splitting(TorchFunctionMode):
    """Sees what the model's functions become when `local_ops` and the stage's runner have had their say."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and torch.is_grad_enabled():
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not _is_weight(weight):
        return F.linear(input, weight, bias)
    made: torch.Tensor = _Product.apply(input, weight, bias)
    return made


def _is_weight(tensor: Any) -> bool:
    """Whether it is a parameter itself: of what is made of one autograd brings the gradient back."""
    return isinstance(tensor, nn.Parameter) and tensor.is_leaf and tensor.requires_grad and tensor.ndim == 2


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.weight = weight  # what is unpacked of a layer that runs again is not the parameter itself
        return F.linear(input, weight, bias).detach()  # no view to autograd: those of such functions can't be written into

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        rows = _rows(gradient)
        passed = rows.mm(weight).view(input.shape) if ctx.needs_input_grad[0] else None
        bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        product = Product(ctx.weight, input.detach(), gradient)
        if Later.on is None:
            product.add()
        else:
            Later.on.products.append(product)
        return passed, None, bias


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
