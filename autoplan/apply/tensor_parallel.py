"""The tp axis: every parameter becomes a DTensor on it, hooks redistribute activations, the forward pass gets its rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from autoplan.apply import borders
from autoplan.apply._torch import StridedShard
from autoplan.apply.local_ops import local_ops
from autoplan.apply.outside import running
from autoplan.apply.shards import ParameterShards
from autoplan.apply.trees import tree_map_only
from autoplan.plan import Plan
from autoplan.strategy import Layout


def parallelize(model: nn.Module, plan: Plan, shards: dict[str, ParameterShards], mesh: DeviceMesh) -> None:
    """Spread the (meta) parameters of `model` over `mesh` and hook the plan's borders."""
    distribute(model, shards, mesh, dealt=False)
    borders.install(model, plan, mesh)


def distribute(model: nn.Module, shards: dict[str, ParameterShards], mesh: DeviceMesh, dealt: bool) -> None:
    """Spread over `mesh` the parameters that are experts', or the others."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if shards[name].dealt == dealt:
            if id(parameter) not in made:
                made[id(parameter)] = _distribute(parameter, shards[name], mesh)
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._parameters[last] = made[id(parameter)]


def _distribute(parameter: nn.Parameter, shards: ParameterShards, mesh: DeviceMesh) -> nn.Parameter:
    local = torch.empty(shards.tp_shape(mesh.size()), dtype=parameter.dtype, device="meta")
    stride = torch.empty(shards.shape, device="meta").stride()
    placements = [parameter_placement(shards.layout)]
    tensor = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shards.shape), stride=stride)
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def parameter_placement(layout: Layout) -> Placement:
    """GATHERED is Replicate with a Partial gradient: FSDP brings a gradient to its parameter's placement, whatever arrives."""
    if not layout.sharded:
        return Replicate()
    return Shard(layout.dim) if layout.blocks == 1 else StridedShard(layout.dim, split_factor=layout.blocks)


def wrap_forward(model: nn.Module, mesh: DeviceMesh) -> None:
    """Run the root's forward with `LocalOps` on; what it returns replicated, and the loss in any case, is a plain tensor."""
    forward = model.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with local_ops(mesh):
            return tree_map_only(DTensor, plain, forward(*args, **kwargs))

    model.forward = wrapped


def plain(tensor: DTensor) -> torch.Tensor:
    """A local tensor for what every rank has whole, and for scalars; sharded logits stay sharded (for `loss_fn`)."""
    mode = running()
    found: torch.Tensor = _plain(tensor) if mode is None or mode.paused else mode.one_call(_plain, tensor)
    return found


def _plain(tensor: DTensor) -> torch.Tensor:
    if tensor.ndim > 0 and not all(placement.is_replicate() for placement in tensor.placements):
        return tensor
    local: torch.Tensor = _Plain.apply(tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim))
    return local


class _Plain(torch.autograd.Function):
    """`to_local` of a replicated tensor, but no view of it: FSDP warns of those, since writing into one would undo its hooks."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> torch.Tensor:
        ctx.mesh = tensor.device_mesh
        local = tensor.to_local()
        return local.clone() if local._is_view() else local

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> DTensor:
        return DTensor.from_local(gradient, ctx.mesh, [Replicate()] * ctx.mesh.ndim, run_check=False)
