"""The dp axes, recomputation and number formats: FSDP2 around every layer of the plan and around the rest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from autoplan.apply._torch import beside, flattened
from autoplan.apply.local_ops import local_ops
from autoplan.apply.shards import ParameterShards
from autoplan.apply.stages import Rank, fsdp_units
from autoplan.apply.zero import Unit, keeps
from autoplan.plan import Plan
from autoplan.workload import Workload


def recompute(model: nn.Module, plan: Plan, tp: DeviceMesh | None) -> None:
    """Let the layers that the plan recomputes keep their inputs alone. The borders' hooks stay outside: they run once."""
    for name, strategy in plan.layers():
        if strategy.recompute == "full":
            module = model.get_submodule(name)
            module.forward = _checkpointed(module.forward, tp)


def _checkpointed(forward: Callable[..., Any], tp: DeviceMesh | None) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with local_ops(tp):  # the second run happens in the backward pass, outside the root's forward
            return forward(*args, **kwargs)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(run, **kwargs), *args, use_reentrant=False)

    return wrapped


def shard(model: nn.Module, plan: Plan, shards: dict[str, ParameterShards], mesh: DeviceMesh) -> list[Unit]:
    """FSDP per layer and for the root, over `dp_shard` (and `cp`), replicated over `dp_replicate`; returns what it manages.

    A mesh of size 1 goes the same way: FSDP then skips its collectives, and still casts parameters, brings gradients to
    their placements and keeps master weights, so there is one path. Resharding is free there, so it always happens.
    """
    wrap = _wrapper(model, plan, shards, mesh)
    for name, strategy in plan.layers():
        wrap(model.get_submodule(name), reshard_after_forward=not keeps(strategy.zero, plan.mesh.shards))
    wrap(model, reshard_after_forward=not keeps(plan.outer_strategy.zero, plan.mesh.shards))
    units = [(model.get_submodule(name), strategy.zero) for name, strategy in plan.layers()]
    return [*units, (model, plan.outer_strategy.zero)]  # type: ignore[list-item]


def shard_stages(
    root: Rank, model: nn.Module, ignored: dict[nn.Module, set[nn.Parameter]], plan: Plan,
    shards: dict[str, ParameterShards], mesh: DeviceMesh,
) -> dict[int, list[Unit]]:  # fmt: skip
    """The same for a pipeline rank's virtual stages: `ignored` holds the parameters that are others'."""
    wrap = _wrapper(model, plan, shards, mesh)
    outer = not keeps(plan.outer_strategy.zero, plan.mesh.shards)
    units = fsdp_units(root, plan, model)
    for number, stage in root.stages.items():
        for layer, zero in units[int(number)][:-1]:
            wrap(layer, reshard_after_forward=not keeps(zero, plan.mesh.shards))
        wrap(stage, reshard_after_forward=outer, ignored_params=ignored[stage])
    wrap(root, reshard_after_forward=outer, ignored_params=ignored[root])
    for position, each in units.items():
        _prefetch_within([module for module, _ in each], ends=position == len(plan.stages) - 1)
    _prefetch_nothing(root)  # type: ignore[arg-type]
    return units


def _prefetch_within(stage: list[FSDPModule], ends: bool) -> None:
    """In the backward pass gather the layer before, as FSDP does, but none of another stage or micro-batch.

    FSDP would go on to what ran before the stage's first layer; that is needed much later, if at all. The stage itself
    prefetches its last layer in the pipeline's last stage alone, behind the loss. In others that layer is next anyway,
    and FSDP would ask for it once for each tensor that the stage sends: again after it has run, for what an encoder-decoder
    sends past it.
    """
    *layers, whole = stage
    for before, module in zip(layers, [*layers[1:], *([whole] if ends else [])], strict=False):
        module.set_modules_to_backward_prefetch([before])
    for module in [layers[0], *([] if ends else [whole])]:
        _prefetch_nothing(module)


def _prefetch_nothing(module: FSDPModule) -> None:
    """An empty list would mean that FSDP decides, so the module names itself."""
    module.set_modules_to_backward_prefetch([module])


def _wrapper(model: nn.Module, plan: Plan, shards: dict[str, ParameterShards], mesh: DeviceMesh) -> Any:
    """`fully_shard` with everything that is alike for all modules."""
    replicated = plan.mesh.dp_replicate > 1
    sharded = flattened(mesh, *(["dp_shard", "cp"] if plan.mesh.cp > 1 else ["dp_shard"]))
    dims = {id(p): shards[name].fsdp_dim for name, p in model.named_parameters(remove_duplicate=False)}
    return partial(
        fully_shard,
        mesh=beside(mesh["dp_replicate"], sharded) if replicated else sharded,
        mp_policy=mixed_precision(plan.workload),
        shard_placement_fn=lambda parameter: Shard(dims[id(parameter)]),
    )


def mixed_precision(workload: Workload) -> MixedPrecisionPolicy:
    """Parameters live in `param_dtype`; FSDP casts them for computing and gradients for reducing, where those differ."""
    param, compute, reduce = (dtype(name) for name in (workload.param_dtype, workload.compute_dtype, workload.reduce_dtype))
    return MixedPrecisionPolicy(
        param_dtype=compute if compute != param else None,
        reduce_dtype=reduce if reduce != compute else None,
        cast_forward_inputs=compute != param,
    )


def dtype(name: str) -> torch.dtype:
    """The torch dtype of a plan's word."""
    found: torch.dtype = getattr(torch, name)
    return found
