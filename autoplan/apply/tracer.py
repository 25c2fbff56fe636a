"""`trace` finds a model's `Program`: one forward pass in which every tensor that a parameter touches is on the meta device.

All ranks find the same and nothing is sent: they run the same code on batches of the same shape.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from autoplan.apply.deferred import named_tensors
from autoplan.apply.local_ops import local_ops
from autoplan.apply.outside import LAYER, Outside, Site
from autoplan.apply.program import CUT, Program, positions, wires
from autoplan.apply.trees import tree_leaves, tree_map_only
from autoplan.errors import UsageError
from autoplan.plan import Plan

Loss = Callable[[nn.Module, dict[str, Any], dict[str, Any]], torch.Tensor]
"""(model, arguments of its forward, batch for the loss function) -> loss."""


def shadow(model: nn.Module, compute: torch.dtype | None) -> nn.Module:
    """A copy of `model`, whose tensors are on meta, to be traced; parameters in the format that is computed in."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        data = parameter.detach()
        if compute is not None and data.is_floating_point():
            data = data.to(compute)
        memo[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
    return copy.deepcopy(model, memo)


def in_mode_of(model: nn.Module, copied: nn.Module) -> nn.Module:
    """The `shadow`, each module of it training or not as that of `model` is."""
    for module, double in zip(model.modules(), copied.modules(), strict=True):
        double.training = module.training
    return copied


def trace(
    model: nn.Module, plan: Plan, batch: dict[str, Any], loss: Loss, tp: DeviceMesh | None, compute: torch.dtype | None
) -> Program:
    """The program of `model`, a `shadow`, for micro-batches like `batch`.

    Raises `UsageError` where the forward pass depends on values that another stage would have.
    """
    device = next((value.device for value in batch.values() if isinstance(value, torch.Tensor)), torch.device("cpu"))
    inputs = batch if compute is None else {name: _cast(value, compute) for name, value in batch.items()}
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), local_ops(tp):
        tracer = Tracer(model, device, compute)
        with tracer:
            dtype = loss(model, inputs, batch).dtype
    return _program(model, plan, tracer, dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _program(model: nn.Module, plan: Plan, tracer: Tracer, loss: torch.dtype) -> Program:
    stages = positions(plan, tracer.layers)
    readers: dict[int, set[int]] = {}
    for parameter, position in tracer.parameters:
        readers.setdefault(parameter, set()).add(stages[position])
    for name, stage in zip(tracer.layers, stages, strict=False):
        for inner in model.get_submodule(name).parameters():
            readers.setdefault(id(inner), set()).add(stage)
    named = model.named_parameters(remove_duplicate=False)
    return Program(
        stages=stages,
        layers=tuple(tracer.layers),
        outputs=tuple(tracer.outputs),
        wires=tuple(wires(stages, tracer.tensors, tracer.reads)),
        readers={name: frozenset(readers.get(id(parameter), {stages[-1]})) for name, parameter in named},
        loss=loss,
    )


class Tracer(Outside):
    """Everything that a parameter touches is another stage's; notes what is made and read where."""

    def __init__(self, model: nn.Module, device: torch.device, cast: torch.dtype | None) -> None:
        super().__init__(device)
        self.cast = cast
        self.free = {id(tensor): tensor for tensor in _tables(model)}
        """Meta tensors of which every rank will have the values: tables, and what is computed from them and the batch."""
        self.layers: list[str] = []
        self.outputs: list[Any] = []
        self.tensors: dict[Site, torch.Tensor] = {}
        self.reads: set[tuple[Site, int]] = set()
        """(a tensor, the position of a use)."""
        self.parameters: set[tuple[int, int]] = set()
        """(id of a parameter, the position of a use)."""
        self._meta = torch.device("meta")

    def mine(self) -> bool:
        return False

    def is_absent(self, tensor: torch.Tensor) -> bool:
        return super().is_absent(tensor) and id(tensor) not in self.free

    def everywhere(self, func: Callable[..., Any], args: Any, kwargs: Any, leaves: list[torch.Tensor]) -> Any:
        if not any(id(leaf) in self.free for leaf in leaves):
            return super().everywhere(func, args, kwargs, leaves)
        args, kwargs = tree_map_only(torch.Tensor, self.absent, (args, kwargs))
        args, kwargs = tree_map_only(torch.device, lambda _: self._meta, (args, kwargs))
        result = func(*args, **kwargs)
        self.free.update({id(leaf): leaf for leaf in _tensors(result)})
        return result

    def elsewhere(self, site: Site, name: str, func: Any, args: Any, kwargs: Any, leaves: list[torch.Tensor]) -> Any:
        sites = [(leaf, self.site(leaf)) for leaf in leaves]  # before the call: it may write into one of them
        result = super().elsewhere(site, name, func, args, kwargs, leaves)
        if name == "__setitem__" or any(True for _ in _tensors(result)):
            self._read(sites)
        return result

    def _read(self, sites: list[tuple[torch.Tensor, Site | None]]) -> None:
        for leaf, site in sites:
            if site is not None:
                self.reads.add((site, self.position))
            elif isinstance(leaf, nn.Parameter):
                self.parameters.add((id(leaf), self.position))

    def made(self, tensor: torch.Tensor, site: Site) -> None:
        super().made(tensor, site)
        self.tensors[site] = tensor

    def layer(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in self.layers:
            raise UsageError(f"layer '{name}' is called twice in one forward pass, which a pipeline can't run.", CUT)
        self._read([(leaf, self.site(leaf)) for leaf in _tensors((args, kwargs))])
        self.layers.append(name)
        with self.pause():  # else tensors would not say that they are on meta
            args, kwargs = tree_map_only(torch.Tensor, self._entering, (args, kwargs))
        with self.pause(), self._meta, Inside(self, name, (args, kwargs)):
            output = tree_map_only(torch.Tensor, self._apart, self._shapes(name, call, args, kwargs))
            kept = tree_map_only(torch.Tensor, torch.Tensor.detach, output)
        self.outputs.append(kept)
        for j, leaf in enumerate(tree_leaves(output)):
            if isinstance(leaf, torch.Tensor):
                self.made(leaf, Site(self.position, LAYER, j))
            elif not isinstance(leaf, int | float | str | None):
                kind = type(leaf).__name__
                raise UsageError(f"layer '{name}' returns a {kind}, of which a pipeline knows nothing.", CUT)
        self.next_layer()
        return output

    def _shapes(self, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error).lower():
                raise
            raise UsageError(
                f"the shapes that layer '{name}' computes depend on the values of its tensors ({str(error).splitlines()[0]})",
                "A pipeline must know the shapes of what it sends: make the plan without pp.",
            ) from error

    def _apart(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a layer returns as it was given it is another tensor from here on: it has another site."""
        return tensor if self.site(tensor) is None else tensor.view_as(tensor)

    def _entering(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = self.absent(tensor)
        return tensor.to(self.cast) if self.cast is not None and tensor.is_floating_point() else tensor


class Inside(TorchFunctionMode):
    """In a layer all is on meta: so are the tensors that reach it otherwise than as arguments, if every rank has them."""

    def __init__(self, tracer: Tracer, name: str, arguments: Any) -> None:
        super().__init__()
        self.tracer, self.name = tracer, name
        self.passed = {id(leaf) for leaf in _tensors(arguments)}
        self.passed |= {id(leaf._local_tensor) for leaf in _tensors(arguments) if isinstance(leaf, DTensor)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, self._known, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _known(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self.passed and self.tracer.site(tensor) is not None:
            raise UsageError(
                f"a tensor reaches layer '{self.name}' that is no argument of its call, so that no stage can send it.",
                "Pass it to the layer's forward.",
            )
        return self.tracer.absent(tensor)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _tables(model: nn.Module) -> Iterator[torch.Tensor]:
    return (tensor for _, tensor in named_tensors(model) if tensor.is_meta and not isinstance(tensor, nn.Parameter))
