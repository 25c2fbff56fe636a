"""`apply`: the order in which a module becomes parallel, on one page."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autoplan.adapt import adapt
from autoplan.apply import data_parallel, expert_parallel, ring, stages, tensor_parallel
from autoplan.apply._torch import HashStore
from autoplan.apply.check import check_compiled, check_pipeline, check_world, parameter_shards
from autoplan.apply.context_parallel import cut_inputs
from autoplan.apply.loss import LossFn, loss_of
from autoplan.apply.materialize import Source, materialize, source
from autoplan.apply.meshes import dealing_mesh_of, mesh_of
from autoplan.apply.model import ParallelModel
from autoplan.apply.outside import watch
from autoplan.apply.pipeline import Pipeline
from autoplan.apply.runner import Doubles
from autoplan.apply.shards import Coordinate, ParameterShards
from autoplan.apply.tracer import in_mode_of, shadow, trace
from autoplan.errors import UsageError
from autoplan.plan import Plan

Inputs = dict[str, Any] | Callable[[int], dict[str, Any]]


def apply(
    model: nn.Module | Callable[[], nn.Module],
    plan: Plan,
    *,
    device: torch.device | str | None = None,
    seed: int = 0,
    loss_fn: LossFn | None = None,
    inputs: Inputs | None = None,
    allocating: AbstractContextManager[Any] | None = None,
) -> ParallelModel:
    """Make `model` run in parallel as `plan` says, in place: names, `state_dict` keys and `isinstance` stay.

    `model` is a module with its weights on the CPU, the same on every rank, of which each rank keeps its part; or a
    function that builds it, which is called without allocating weights: no rank ever holds the whole model, and the
    weights equal those of `torch.manual_seed(seed); model()` on one device, bit for bit.

    `loss_fn(output, batch)` turns the output of a model that returns no loss into one, for `ParallelModel.step`.
    `inputs` are keyword arguments of the model's forward, or a function that makes them for a number of samples. A plan
    with a pipeline needs them, to be cut in the order of the forward pass.
    `allocating` is entered while memory is taken and filled: torch's FakeTensorMode, for a dry run.
    Make the optimizer afterwards, from `ParallelModel.parameters`; the default random generator is seeded anew. Models applied
    in one process share the process groups of meshes that are alike: run them one after another.
    Raises `UsageError` on every rank when the launch or the model isn't the plan's.
    """
    device = _device(device)
    check_world(plan, _started())  # before anyone joins: a rank that ends would take along who still waits for it
    _join(device)
    check_pipeline(plan)
    check_compiled(plan)
    if isinstance(model, nn.Module):
        parameter_shards(model, plan)  # a misfit is told while the module still has its weights
    found = source(model, data_parallel.dtype(plan.workload.param_dtype), seed)
    module = found.model
    adapt(module)
    shards = parameter_shards(module, plan)
    mesh, dealing = mesh_of(plan, device), dealing_mesh_of(plan, device)
    place = Place(mesh, dealing, _coordinate(mesh, dealing), device)
    allocating = allocating or nullcontext()
    if plan.mesh.tp > 1:
        tensor_parallel.parallelize(module, plan, shards, mesh["tp"])
    if dealing is not None:
        tensor_parallel.distribute(module, shards, dealing["ep"], dealt=True)
    if plan.pipeline is None:
        _whole(found, plan, shards, place, allocating)
        pipeline = None
    else:
        pipeline = _staged(found, plan, shards, place, loss_fn, inputs, allocating)
    parallel = ParallelModel(module, plan, mesh, shards, place.at, loss_fn, pipeline, spread_over(plan, mesh))
    # dropout: alike within a tp group, different between dp ranks and between stages
    torch.manual_seed(seed + parallel.dp_rank + (pipeline.rank * parallel.dp_size if pipeline else 0))
    return parallel


class Place(NamedTuple):
    """Where this process is."""

    mesh: DeviceMesh
    dealing: DeviceMesh | None
    """Another view of the same devices, with the axes efsdp and ep; None where no experts are dealt."""
    at: Coordinate
    device: torch.device


def _whole(
    found: Source, plan: Plan, shards: dict[str, ParameterShards], place: Place, allocating: AbstractContextManager[Any]
) -> None:
    """Every rank has its share of the whole model."""
    spread = spread_over(plan, place.mesh)
    _wrap_forwards(found.model, plan, spread, place.dealing)
    data_parallel.recompute(found.model, plan, spread)
    data_parallel.compile_layers(found.model, plan)
    data_parallel.shard(found.model, plan, shards, place.mesh, place.dealing)
    with allocating:
        data_parallel.allocate(found.model, plan, place.device)
        materialize(found, shards, place.at, place.device)


def _staged(
    found: Source, plan: Plan, shards: dict[str, ParameterShards], place: Place,
    loss_fn: LossFn | None, inputs: Inputs | None, allocating: AbstractContextManager[Any],
) -> Pipeline:  # fmt: skip
    """Every rank has its share of its stages; the rest stays on meta."""
    if inputs is None:
        raise UsageError(
            "apply needs to know what the model is called with, to cut it into pipeline stages.",
            "Pass inputs=example_inputs, or a batch, to autoplan.apply.",
        )
    module, (mesh, dealing, at, device) = found.model, place
    spread = spread_over(plan, mesh)
    compute = data_parallel.mixed_precision(plan.workload).param_dtype
    copied = shadow(module, compute)
    for each in (module, copied):
        for name, _ in plan.layers():
            watch(each.get_submodule(name), name)
        _wrap_forwards(each, plan, spread, dealing)

    def loss(model: nn.Module, arguments: dict[str, Any], batch: dict[str, Any]) -> torch.Tensor:
        return loss_of(model, arguments, batch, loss_fn, spread)

    with allocating:  # code that asks whether tensors are fake must hear the same as when it runs
        example = inputs(plan.micro_batch) if callable(inputs) else inputs
        example = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in example.items()}
        pipeline = Pipeline(
            plan,
            mesh,
            spread,
            device,
            lambda batch: trace(in_mode_of(module, copied), plan, batch, loss, spread, compute),
            example,
        )
    data_parallel.recompute(module, plan, spread)
    data_parallel.compile_layers(module, plan)
    root, ignored = stages.build(module, plan, pipeline.program, pipeline.rank, pipeline.run)
    units = data_parallel.shard_stages(root, module, ignored, plan, shards, mesh, dealing)
    present = stages.present(module, plan, pipeline.program, pipeline.rank)
    with allocating:
        stages.allocate(root, module, present, device)
        materialize(found, shards, at, device, present)
    pipeline.attach(root, units, Doubles(module, copied), lambda arguments, batch: loss(module, arguments, batch))
    return pipeline


def _wrap_forwards(model: nn.Module, plan: Plan, spread: DeviceMesh | None, dealing: DeviceMesh | None) -> None:
    if dealing is not None:
        expert_parallel.install(model, plan, dealing["ep"], spread)
    if spread is None:
        return
    if plan.mesh.cp > 1:
        cut_inputs(model, dict(plan.context), spread)
    tensor_parallel.wrap_forward(model, spread)


def spread_over(plan: Plan, mesh: DeviceMesh) -> DeviceMesh | None:
    """The axes over which the tensors of one micro-batch are spread; None when every device has them whole."""
    axes = tuple(axis for axis in ("cp", "tp") if getattr(plan.mesh, axis) > 1)
    if not axes:
        return None
    spread = mesh[axes]
    ring.use(spread, plan.mesh.cp_kind)
    return spread


def _device(device: torch.device | str | None) -> torch.device:
    """The given device; else this process's accelerator, or the CPU."""
    if device is not None:
        return torch.device(device)
    if torch.accelerator.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
        torch.accelerator.set_device_index(index)
        return torch.device(torch.accelerator.current_accelerator().type, index)  # type: ignore[union-attr]
    return torch.device("cpu")


def _started() -> int:
    """The number of processes: torchrun's, or this one alone."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def _join(device: torch.device) -> None:
    """Make sure that they are joined."""
    if not dist.is_initialized():
        backend = dist.get_default_backend_for_device(device)
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def _coordinate(mesh: DeviceMesh, dealing: DeviceMesh | None) -> Coordinate:
    shard, shards = mesh.get_local_rank("dp_shard"), mesh["dp_shard"].size()
    if "cp" in (mesh.mesh_dim_names or ()):  # FSDP cuts over both, cp within dp_shard
        cp = mesh["cp"].size()
        shard, shards = shard * cp + mesh.get_local_rank("cp"), shards * cp
    experts = None
    if dealing is not None:
        experts = Coordinate(
            dealing.get_local_rank("ep"), dealing["ep"].size(), dealing.get_local_rank("efsdp"), dealing["efsdp"].size()
        )
    return Coordinate(mesh.get_local_rank("tp"), mesh["tp"].size(), shard, shards, experts)
