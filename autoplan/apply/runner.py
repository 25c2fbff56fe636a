"""`Runner`: one micro-batch's forward pass as one virtual stage sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from autoplan.apply.outside import LAYER, Finished, Outside, Site, writes
from autoplan.apply.program import CUT, Program, Wire
from autoplan.apply.trees import tree_leaves, tree_map_only
from autoplan.errors import UsageError


class Doubles:
    """For the parameters of `model`, sharded or gathered by FSDP, those of its `shadow`, in whose shapes it computes."""

    def __init__(self, model: nn.Module, shadow: nn.Module) -> None:
        self._model = model
        self._shadow = dict(shadow.named_parameters(remove_duplicate=False))
        self._known: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
        if id(parameter) not in self._known:  # FSDP puts another object in the place of one that it gathers
            for name, found in self._model.named_parameters(remove_duplicate=False):
                self._known[id(found)] = found, self._shadow[name]
        return self._known[id(parameter)][1].detach()


class Runner(Outside):
    """Runs the stage's own part on what was received, and collects what it must send; see `outside`."""

    def __init__(
        self, program: Program, stage: int, received: dict[Site, torch.Tensor], device: torch.device, doubles: Doubles
    ) -> None:
        super().__init__(device)
        self._doubles = doubles
        self.program = program
        self.stage = stage
        self.received = received
        self.collected: dict[Site, torch.Tensor] = {}
        self._wanted = {wire.site for wire in program.wires if wire.source == stage}
        self._changed: dict[int, torch.Tensor] = {}
        """By id of an absent tensor: what was received for it, since changed in place."""

    def mine(self) -> bool:
        return self.program.stages[self.position] == self.stage

    def run(self, site: Site, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        first = args[0] if args else None
        args, kwargs = tree_map_only(torch.Tensor, self._present, (args, kwargs))
        changes = writes(name) and isinstance(first, torch.Tensor)
        if isinstance(first, torch.Tensor) and changes and args[0] is not first:
            args = (args[0].clone(), *args[1:])
            self._changed[id(first)] = args[0]
            self.sites[id(first)] = first, site
        result = func(*args, **kwargs)
        if self._wanted:
            self._collect(site, result)
            if changes:
                self._collect(site, args[0])
        return result

    def _present(self, tensor: torch.Tensor) -> torch.Tensor:
        """What was received for an absent tensor; it stays absent when nothing was: then only its shape is asked for."""
        if id(tensor) in self._changed:
            return self._changed[id(tensor)]
        site = self.site(tensor)
        return tensor if site is None else self.received.get(site, tensor)

    def _collect(self, site: Site, result: Any) -> None:
        for j, leaf in enumerate(tree_leaves(result)):
            if isinstance(leaf, torch.Tensor) and site._replace(leaf=j) in self._wanted:
                self.collected[site._replace(leaf=j)] = leaf
        if len(self.collected) == len(self._wanted):
            raise Finished

    def absent(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._doubles.of(tensor) if isinstance(tensor, nn.Parameter) else super().absent(tensor)

    def elsewhere(self, site: Site, name: str, func: Any, args: Any, kwargs: Any, leaves: list[torch.Tensor]) -> Any:
        with torch.no_grad():
            return super().elsewhere(site, name, func, args, kwargs, leaves)

    def layer(self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        expected = self.program.layers[self.position] if self.position < len(self.program.layers) else "no layer"
        if name != expected:
            raise UsageError(f"the forward pass calls '{name}' where it called '{expected}' before: it must not branch.", CUT)
        site = Site(self.position, LAYER, 0)
        mine = self.mine()
        if mine:
            args, kwargs = tree_map_only(torch.Tensor, self._present, (args, kwargs))
            with self.pause():
                output = call(*args, **kwargs)
        else:
            output = self.program.outputs[self.position]
            for j, leaf in enumerate(tree_leaves(output)):
                if isinstance(leaf, torch.Tensor):
                    self.made(leaf, site._replace(leaf=j))
        self.next_layer()
        if mine and self._wanted:
            self._collect(site, output)
        return output


def arrive(local: torch.Tensor, wire: Wire, tp: DeviceMesh | None) -> torch.Tensor:
    """What was received, as the model knows it."""
    if wire.placements is None:
        return pass_on(local)
    assert tp is not None
    tensor: torch.Tensor = _Arrive.apply(local, wire, tp)
    return tensor


def leave(tensor: torch.Tensor, wire: Wire) -> torch.Tensor:
    """What is sent of a tensor. Raises `UsageError` when it isn't what the other stage awaits."""
    if not wire.fits(tensor):
        placements = f" {list(map(str, tensor.placements))}" if isinstance(tensor, DTensor) else ""
        raise UsageError(
            f"stage {wire.source} made a tensor {list(tensor.shape)}{placements} where {list(wire.shape)} is awaited.",
            "The forward pass must compute the same shapes for every batch of one shape.",
        )
    local: torch.Tensor = _Leave.apply(tensor) if isinstance(tensor, DTensor) else tensor
    local = local.contiguous()
    return pass_on(local) if local._is_view() else local


class _Arrive(torch.autograd.Function):
    """Local tensor -> DTensor; the gradient goes back in the placement in which `_Leave` takes it."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, wire: Wire, mesh: DeviceMesh) -> DTensor:
        ctx.placements = [_gradient(placement) for placement in wire.placements or ()]
        shape, stride = torch.Size(wire.shape), wire.stride
        over = mesh if len(ctx.placements) == mesh.ndim else mesh["tp"]  # not cut along the sequence
        return DTensor.from_local(local, over, wire.placements, run_check=False, shape=shape, stride=stride)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> tuple[torch.Tensor, None, None]:
        return gradient.redistribute(placements=ctx.placements).to_local(), None, None


def pass_on(local: torch.Tensor) -> torch.Tensor:
    """The same tensor, and no view to autograd: those of FSDP's own functions can't be written into."""
    passed: torch.Tensor = _PassOn.apply(local)
    return passed


class _PassOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        return local.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _Leave(torch.autograd.Function):
    """DTensor -> local tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> torch.Tensor:
        ctx.like = tensor.device_mesh, [_gradient(placement) for placement in tensor.placements], tensor.shape, tensor.stride()
        return tensor.to_local().detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> DTensor:
        mesh, placements, shape, stride = ctx.like
        return DTensor.from_local(gradient, mesh, placements, run_check=False, shape=shape, stride=stride)


def _gradient(placement: Placement) -> Placement:
    return Replicate() if placement.is_partial() else placement
