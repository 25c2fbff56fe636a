"""The forward pass of the whole model on a rank that holds a part of it: what is not its own stays on the meta device.

Every pipeline stage calls the user's own `forward`. A tensor that another stage makes is *absent* here: a meta tensor,
which knows its shape and dtype, owns no memory, and whose operations compute shapes alone. Between the layers a mode sees
every torch call and numbers it; a layer counts as one call. The number names a tensor alike on all stages, since they run
the same program: so one stage sends tensor (position 12, call 3) and another takes what it received in its stead.

A call at position `n`, before the n-th layer has been called, belongs to the stage of that layer, by this rule:

    this stage's position                     it runs; absent arguments are replaced by what was received
    another's; an argument is absent, a       the result is absent
    parameter, or it draws random numbers
    another's, and nothing of the above       it runs: masks, positions and rotary tables need only the batch
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from autoplan.apply._torch import call_module, replace_call
from autoplan.apply.trees import tree_leaves, tree_map_only
from autoplan.errors import UsageError

LAYER = -1
"""Instead of the number of a call: the layer itself."""


class Finished(BaseException):
    """The stage has all that it must send: the rest of the forward pass is not its own."""


class Site(NamedTuple):
    """Where a tensor is made: layers called before, calls since the last of them, place among the results."""

    position: int
    call: int
    leaf: int


_running = threading.local()


def running() -> Outside | None:
    """The pass that is under way, if there is one."""
    return getattr(_running, "mode", None)


def watch(module: nn.Module, name: str) -> None:
    """Let the pass under way decide what a call of `module`, a layer with its hooks, becomes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        mode = running()
        if mode is None or mode.paused:
            return call_module(module, *args, **kwargs)
        return mode.layer(name, partial(call_module, module), args, kwargs)

    replace_call(module, call)


class Outside(TorchFunctionMode):
    """See the module. `Tracer` and `Runner` say what becomes of the calls."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.position = 0
        self.calls = 0
        self.paused = False
        self.sites: dict[int, tuple[torch.Tensor, Site]] = {}
        """Absent tensors by id, kept so that no id is used twice."""
        self.twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Tensors of this rank that another stage has written into since, and what stands for them."""

    def __enter__(self) -> Outside:
        _running.mode = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _running.mode = None
        super().__exit__(*error)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Calls are not seen in here: a layer is one call."""
        self.paused = True
        super().__exit__(None, None, None)
        try:
            yield
        finally:
            super().__enter__()
            self.paused = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._call(func, args, kwargs or {})

    def one_call(self, func: Callable[..., Any], *args: Any) -> Any:
        """Run a function of our own as if it were one of torch's."""
        with self.pause():
            return self._call(func, args, {})

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        site = Site(self.position, self.calls, 0)
        self.calls += 1
        if name == "__get__" and func in _PLACES and args[0].is_meta:
            return _PLACES[func](self.device)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if self.mine():
            return self.run(site, name, func, args, kwargs)
        if name in _RANDOM or any(map(self.is_absent, leaves)):
            return self.elsewhere(site, name, func, args, kwargs, leaves)
        return self.everywhere(func, args, kwargs, leaves)

    def everywhere(self, func: Callable[..., Any], args: Any, kwargs: Any, leaves: list[torch.Tensor]) -> Any:
        """What every stage computes for itself."""
        return func(*args, **kwargs)

    def is_absent(self, tensor: torch.Tensor) -> bool:
        """Is the tensor, or a value of it, another stage's (at a position that is another's)?"""
        return isinstance(tensor, nn.Parameter) or tensor.is_meta or id(tensor) in self.twins

    def elsewhere(
        self, site: Site, name: str, func: Callable[..., Any], args: Any, kwargs: Any, leaves: list[torch.Tensor]
    ) -> Any:
        """The shapes of what another stage computes."""
        if name in ("cuda", "cpu"):
            return args[0]
        target = args[0] if args else None
        args, kwargs = tree_map_only(torch.Tensor, self.absent, (args, kwargs))
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("meta"), (args, kwargs))
        if name == "to":
            args, kwargs = tree_map_only(str, lambda _: "meta", (args, kwargs))
        elif not leaves:
            kwargs = {**kwargs, "device": "meta"}
        try:
            result = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error).lower():
                raise
            raise UsageError(
                f"the model reads the value of a tensor outside its layers, with {name or func} in {_place()}.",
                "A pipeline stage doesn't have the tensors of the others: make the plan without pp.",
            ) from error
        for j, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, torch.Tensor):
                self.made(leaf, site._replace(leaf=j))
        if writes(name) and isinstance(target, torch.Tensor):
            written = args[0]
            self.made(written, site)
            if written is not target:
                self.twins[id(target)] = target, written
        return result

    def absent(self, tensor: torch.Tensor) -> torch.Tensor:
        """A meta tensor like this one."""
        if id(tensor) in self.twins:
            return self.twins[id(tensor)][1]
        return tensor if tensor.is_meta else like(tensor)

    def made(self, tensor: torch.Tensor, site: Site) -> None:
        self.sites[id(tensor)] = tensor, site

    def site(self, tensor: torch.Tensor) -> Site | None:
        tensor = self.twins[id(tensor)][1] if id(tensor) in self.twins else tensor
        return self.sites[id(tensor)][1] if id(tensor) in self.sites else None

    def next_layer(self) -> None:
        self.position += 1
        self.calls = 0

    def mine(self) -> bool:
        """Does this stage run the calls at the present position?"""
        raise NotImplementedError

    def run(self, site: Site, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def layer(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer is called; `call` would run it."""
        raise NotImplementedError


def like(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor of the same shape, dtype and placements."""
    if not isinstance(tensor, DTensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    local = like(tensor.to_local())
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def writes(name: str) -> bool:
    """Does a function of this name change its first argument?"""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__"))
    return name.endswith("_") and name != "requires_grad_"


def _place() -> str:
    """File and line of the user's code that is running."""
    frame, ours = sys._getframe(1), (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    while frame is not None and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "the forward pass"


_PLACES: dict[Any, Callable[[torch.device], Any]] = {
    torch.Tensor.device.__get__: lambda device: device,
    torch.Tensor.is_meta.__get__: lambda device: False,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: lambda device: device.type == "cuda",  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda device: device.type == "cpu",  # type: ignore[attr-defined]
}
"""Attributes in which an absent tensor would show that it is one."""

_RANDOM = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial", "normal"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "dropout_"),
    *("uniform_", "normal_", "bernoulli_", "random_", "exponential_", "geometric_"),
}
"""Each stage draws its own random numbers: what is drawn for one of them must come from it."""
