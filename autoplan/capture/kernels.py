"""What the kernels cost: the dispatch mode below autograd, and what one kernel reads, writes and computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autoplan.capture import private
from autoplan.capture.normalise import tensors
from autoplan.capture.private import TorchDispatchMode
from autoplan.capture.scope import Meter, place

aten = torch.ops.aten
_READS_ROWS = {aten.embedding.default, aten.index_select.default, aten.gather.default, aten.index.Tensor}
_READS_TARGET_ONLY = {aten.nll_loss_forward.default, aten.nll_loss_backward.default}
_SAYS_YES = {aten.all.default, aten._is_all_true.default}


class Kernels(TorchDispatchMode):
    """Adds FLOPs, bytes and the number of kernels to the call that is running."""

    def __init__(self, meter: Callable[[Any], Meter | None], warn: Callable[[str], None]) -> None:
        super().__init__()
        self._meter = meter
        self._warn = warn
        self._yes: dict[int, Tensor] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper around every kernel: capture never compiles."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is private.DEVICE:  # autograd asks for it more often than it computes
            return private.device_of(args[0])
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._scalar(func, args)
        out = func(*args, **kwargs)
        if private.is_view(func):
            return out
        if func in _SAYS_YES:
            self._yes[id(out)] = out
        meter = self._meter(func)
        if meter is not None:
            meter.flops += private.flops(func, args, kwargs, out)
            meter.bytes += _moved(func, args, kwargs, out)
            meter.kernels += 1
        return out

    def _scalar(self, func: Any, args: Any) -> Any:
        """A tensor's value decides what the Python code does. A fake tensor has none: guess (`all` is true), and say so."""
        try:
            return func(*args)
        except private.DataDependentOutputException:
            dtype = args[0].dtype
            guess: Any = id(args[0]) in self._yes if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
            self._warn(f"{place()} asks for the value of a tensor; capture went on with {guess}")
            return guess


def _moved(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Bytes that a kernel reads and writes, each tensor once; a gather reads the rows that it returns, not the table."""
    written = {id(tensor): tensor for tensor in tensors(out)}
    read = {id(tensor): tensor for tensor in tensors((args, kwargs))}
    total = sum(_size(tensor) for tensor in written.values())
    if func in _READS_ROWS:
        read.pop(id(next(tensors(args))), None)
        total *= 2
    elif func in _READS_TARGET_ONLY:
        read.pop(id(args[0] if func is aten.nll_loss_forward.default else args[1]), None)
    return total + sum(_size(tensor) for tensor in read.values())


def _size(tensor: Tensor) -> float:
    """Bytes of a tensor; of one that is expanded, those that exist."""
    return float(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))
