"""`apply`: the order in which a module becomes parallel, on one page."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autoplan.apply import data_parallel, tensor_parallel
from autoplan.apply._torch import HashStore
from autoplan.apply.check import check_world, parameter_shards
from autoplan.apply.materialize import materialize, source
from autoplan.apply.model import ParallelModel
from autoplan.apply.shards import Coordinate
from autoplan.plan import Plan

LossFn = Callable[[Any, dict[str, Any]], torch.Tensor]


def apply(
    model: nn.Module | Callable[[], nn.Module],
    plan: Plan,
    *,
    device: torch.device | str | None = None,
    seed: int = 0,
    loss_fn: LossFn | None = None,
) -> ParallelModel:
    """Make `model` run in parallel as `plan` says, in place: names, `state_dict` keys and `isinstance` stay.

    `model` is a module with its weights on the CPU, the same on every rank, of which each rank keeps its part; or a
    function that builds it, which is called without allocating weights: no rank ever holds the whole model, and the
    weights equal those of `torch.manual_seed(seed); model()` on one device, bit for bit.

    `loss_fn(output, batch)` turns the output of a model that returns no loss into one, for `ParallelModel.step`.
    Make the optimizer afterwards, from `ParallelModel.parameters`; the default random generator is seeded anew.
    Raises `UsageError` on every rank when the launch or the model isn't the plan's.
    """
    device = _device(device)
    check_world(plan, _start(device))
    if isinstance(model, nn.Module):
        parameter_shards(model, plan)  # a misfit is told while the module still has its weights
    found = source(model, data_parallel.dtype(plan.workload.param_dtype), seed)
    module = found.model
    if plan.mesh.tp > 1:
        from autoplan.adapt import adapt

        adapt(module)
    shards = parameter_shards(module, plan)
    mesh = init_device_mesh(
        device.type, (plan.mesh.dp_replicate, plan.mesh.dp_shard, plan.mesh.tp), mesh_dim_names=("dp_replicate", "dp_shard", "tp")
    )
    tp = mesh["tp"] if plan.mesh.tp > 1 else None
    if tp is not None:
        tensor_parallel.parallelize(module, plan, shards, tp)
    data_parallel.recompute(module, plan, tp)
    data_parallel.shard(module, plan, shards, mesh)
    at = _coordinate(mesh)
    materialize(found, shards, at, device)
    parallel = ParallelModel(module, plan, mesh, shards, at, loss_fn)
    torch.manual_seed(seed + parallel.dp_rank)  # dropout: alike within a tp group, different between dp ranks
    return parallel


def _device(device: torch.device | str | None) -> torch.device:
    """The given device; else this process's accelerator, or the CPU."""
    if device is not None:
        return torch.device(device)
    if torch.accelerator.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
        torch.accelerator.set_device_index(index)
        return torch.device(torch.accelerator.current_accelerator().type, index)  # type: ignore[union-attr]
    return torch.device("cpu")


def _start(device: torch.device) -> int:
    """The number of processes, after making sure that they are joined: torchrun's, or this one alone."""
    if dist.is_initialized():
        return dist.get_world_size()
    backend = dist.get_default_backend_for_device(device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return dist.get_world_size()


def _coordinate(mesh: DeviceMesh) -> Coordinate:
    return Coordinate(mesh.get_local_rank("tp"), mesh["tp"].size(), mesh.get_local_rank("dp_shard"), mesh["dp_shard"].size())
