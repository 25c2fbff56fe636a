"""Models without memory: meta initialisation, and fake copies whose tensors have shapes and no data."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoplan.capture.failures import line_of, said
from autoplan.capture.private import FakeTensorMode, fake_of
from autoplan.errors import UsageError

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full)
_SMALL = 1 << 16
_TABLES = ("_parameters", "_buffers", "_modules")


_FILLS = frozenset(
    f"{name}_"
    for name in (
        *("normal", "uniform", "trunc_normal", "zero", "zeros", "ones", "fill", "constant", "random", "bernoulli"),
        *("kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal", "orthogonal", "exponential"),
    )
)


class _NoMemory(TorchFunctionMode):
    """Leaves out the initial values of tensors that have no memory, and moves none of them to a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        if name == "cuda" or (name == "cpu" and args[0].is_meta):
            return args[0]
        if name == "to":
            args, kwargs = _staying(args, kwargs)
        elif str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _staying(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `Tensor.to` without the device, where there is nothing to move."""
    here = args[0].device
    stay = lambda where: here if _is_device(where) and (here.type == "meta" or "cuda" in str(where)) else where  # noqa: E731
    return tuple(stay(arg) for arg in args), {key: stay(value) if key == "device" else value for key, value in kwargs.items()}


def _is_device(value: Any) -> bool:
    return isinstance(value, str | torch.device)


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
        with torch.device("meta"), _NoMemory():
            return build()
    except (RuntimeError, TypeError) as error:
        if "meta" not in str(error):
            raise
    try:
        with _BigOnMeta(), _NoMemory():
            return build()
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"build_model needs the values of a big tensor, and capture makes none: {said(error)}{line_of(error)}.",
            "Compute the table from a small tensor, or fill it after build_model.",
        ) from error


def fake_copy(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> nn.Module:
    """A copy of `module` on fake tensors, floating parameters cast to `dtype`. No data is copied, `module` is not touched."""
    memo: dict[int, Any] = {}
    for tensor in _tensors_of(module):
        if id(tensor) not in memo:
            memo[id(tensor)] = _fake(tensor, mode, dtype if isinstance(tensor, nn.Parameter) else tensor.dtype)
    memo.update(_empty_tables(module))
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception:
        return copy.deepcopy(module, memo | {id(value): value for value in _unique(module, memo)})


def _empty_tables(module: nn.Module) -> Iterator[tuple[int, Any]]:
    """Copies of the dicts of hooks that modules have and nobody filled, a dozen each: most of what there is to copy."""
    for part in module.modules():
        yield from ((id(value), OrderedDict()) for value in vars(part).values() if type(value) is OrderedDict and not value)


def _unique(module: nn.Module, memo: Mapping[int, Any]) -> Iterator[Any]:
    """What modules hold that can't be copied (locks, files, iterators): it is shared."""
    for part in module.modules():
        for key, value in vars(part).items():
            if key not in _TABLES:
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:
                    yield value


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        for table in (part._parameters, part._buffers, vars(part)):
            yield from (value for value in table.values() if isinstance(value, Tensor))


def _fake(tensor: Tensor, mode: FakeTensorMode, dtype: torch.dtype) -> Tensor:
    return fake_of(tensor, mode, dtype if tensor.dtype.is_floating_point else tensor.dtype)


@contextmanager
def own_buffers(root: nn.Module) -> Iterator[None]:
    """Buffers that are replaced in the context (`self.mean = 0.9 * self.mean + ...`) are the old ones after it."""
    before = [(part._buffers, dict(part._buffers)) for part in root.modules() if part._buffers]
    try:
        yield
    finally:
        for table, kept in before:
            table.clear()
            table.update(kept)


def fake_inputs(inputs: Mapping[str, Any], mode: FakeTensorMode, dtype: torch.dtype) -> dict[str, Any]:
    """The model's inputs on fake tensors, floating ones cast to `dtype`. One tensor passed twice stays one.

    Looks into dicts, lists, tuples and dataclasses.
    """
    memo: dict[int, Tensor] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            _check_layout(value)
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
        if isinstance(value, np.ndarray):
            raise UsageError("example_inputs returns a NumPy array.", "Return tensors: torch.from_numpy(array).")
        return value

    return {name: convert(value) for name, value in inputs.items()}


def _check_layout(tensor: Tensor) -> None:
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else "sparse"
        raise UsageError(
            f"example_inputs returns a {kind} tensor, whose shape says little.",
            "Return a dense one, padded to the longest sample.",
        )
