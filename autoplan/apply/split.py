"""The backward pass in two parts, for the zero-bubble schedule: gradients of inputs at once, those of weights later.

Only products with a weight are split, where half of the work is the weight's gradient: `F.linear`, and `addmm`, `mm`, `matmul` by
a parameter. While `splitting` is on, a mode puts `_Product` in their place, which computes the same and whose backward pass leaves
to a `Later` what the weight's gradient is made of: the product's input and its output's gradient. All else has its backward pass
at once, and the graph is freed, with all that is not needed any more. `torch.distributed.pipelining` awaits just this of a
`dw_builder`; what it does without one keeps the whole graph until then, and would recompute a layer once for every weight.

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
    transposed: bool
    """The weight is (out, in), as that of `F.linear`."""

    @torch.no_grad()
    def add(self) -> None:
        """Add it to the weight's gradient."""
        rows, made = _rows(self.input), _rows(self.gradient)
        found = made.t().mm(rows) if self.transposed else rows.t().mm(made)
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
        found = _OPERANDS.get(func)
        operands = found(*args, **(kwargs or {})) if found is not None and torch.is_grad_enabled() else None
        if operands is None:
            return func(*args, **(kwargs or {}))
        return _Product.apply(*operands)


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, bool]
"""Input, weight, bias, and whether the weight is (out, in)."""


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Operands | None:
    return (input, weight, bias, True) if _is_weight(weight) else None


def _addmm(bias: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, **scales: Any) -> Operands | None:
    return (input, weight, bias, False) if _is_weight(weight) and bias.ndim == 1 and not scales else None


def _matmul(input: torch.Tensor, weight: torch.Tensor, **options: Any) -> Operands | None:
    return (input, weight, None, False) if _is_weight(weight) and input.ndim > 1 and not options else None


_OPERANDS: dict[Any, Callable[..., Operands | None]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), _addmm),
    **dict.fromkeys((torch.mm, torch.matmul, torch.Tensor.mm, torch.Tensor.matmul, torch.Tensor.__matmul__), _matmul),
}


def _is_weight(tensor: Any) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad and tensor.ndim == 2


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.transposed, ctx.weight = transposed, weight  # what is unpacked of a layer that runs again is not the parameter itself
        if transposed:
            made = F.linear(input, weight, bias)
        else:
            made = input.matmul(weight) if bias is None else torch.addmm(bias, input, weight)
        return made.detach()  # no view to autograd: those of functions like this one can't be written into

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        rows = _rows(gradient)
        passed = rows.mm(weight if ctx.transposed else weight.t()).view(input.shape) if ctx.needs_input_grad[0] else None
        bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        product = Product(ctx.weight, input.detach(), gradient, ctx.transposed)
        if Later.on is None:
            product.add()
        else:
            Later.on.products.append(product)
        return passed, None, bias, None


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
