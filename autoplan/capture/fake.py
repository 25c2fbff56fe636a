"""Models without memory: meta initialisation, and fake copies whose tensors have shapes and no data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoplan.capture.private import FakeTensorMode

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full)
_SMALL = 1 << 16


_FILLS = frozenset(
    f"{name}_"
    for name in (
        *("normal", "uniform", "trunc_normal", "zero", "zeros", "ones", "fill", "constant", "random", "bernoulli"),
        *("kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal", "orthogonal", "exponential"),
    )
)


class _NoFill(TorchFunctionMode):
    """Leaves out the initial values of tensors that have no memory: there is nothing to fill."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


class _BigOnMeta(TorchFunctionMode):
    """Diverts only big tensors to meta, for models whose `__init__` looks at values (`torch.linspace(...).item()`)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FACTORIES and kwargs.get("device") is None:
            with torch.device("meta"):
                made = func(*args, **kwargs)
            return made if made.numel() > _SMALL else func(*args, **kwargs)
        return func(*args, **kwargs)


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The module, without memory for its weights."""
    try:
        with torch.device("meta"), _NoFill():
            return build()
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
    with _BigOnMeta(), _NoFill():
        return build()


def fake_copy(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> nn.Module:
    """A copy of `module` on fake tensors, floating parameters cast to `dtype`. No data is copied, `module` is not touched."""
    memo: dict[int, Any] = {}
    for tensor in _tensors_of(module):
        if id(tensor) not in memo:
            memo[id(tensor)] = _fake(tensor, mode, dtype if isinstance(tensor, nn.Parameter) else tensor.dtype)
    return copy.deepcopy(module, memo)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        for table in (part._parameters, part._buffers, vars(part)):
            yield from (value for value in table.values() if isinstance(value, Tensor))


def _fake(tensor: Tensor, mode: FakeTensorMode, dtype: torch.dtype) -> Tensor:
    kind = dtype if tensor.dtype.is_floating_point else tensor.dtype
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device="cpu")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def fake_inputs(inputs: Mapping[str, Any], mode: FakeTensorMode, dtype: torch.dtype) -> dict[str, Any]:
    """The model's inputs on fake tensors, floating ones cast to `dtype`. One tensor passed twice stays one.

    Looks into dicts, lists, tuples and dataclasses.
    """
    memo: dict[int, Tensor] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in memo:
                memo[id(value)] = _fake(value.detach(), mode, dtype)
            return memo[id(value)]
        if isinstance(value, Mapping):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(convert(item) for item in value))
        if isinstance(value, list | tuple):
            return type(value)(convert(item) for item in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{entry.name: convert(getattr(value, entry.name)) for entry in fields(value) if entry.init})
        return value

    return {name: convert(value) for name, value in inputs.items()}
