"""The dp axes, recomputation and number formats: FSDP2 around every layer of the plan and around the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.utils.checkpoint import checkpoint

from autoplan.apply import selective
from autoplan.apply._torch import beside, flattened
from autoplan.apply.expert_parallel import dealt
from autoplan.apply.local_ops import local_ops
from autoplan.apply.shards import ParameterShards
from autoplan.apply.split import splitting
from autoplan.apply.stages import Rank, fsdp_units
from autoplan.apply.zero import Unit, units_of
from autoplan.plan import Plan, needs_fsdp
from autoplan.workload import Workload


def recompute(model: nn.Module, plan: Plan, tp: DeviceMesh | None) -> None:
    """Let the layers that the plan recomputes keep their inputs alone, or these and what `selective` says. The borders' hooks
    stay outside: they run once."""
    for name, strategy in plan.layers():
        if strategy.recompute != "none":
            module = model.get_submodule(name)
            again = selective.run if strategy.recompute == "selective" else partial(checkpoint, use_reentrant=False)
            module.forward = _checkpointed(module.forward, plan, tp, again)


def _checkpointed(
    forward: Callable[..., Any], plan: Plan, tp: DeviceMesh | None, again: Callable[..., Any]
) -> Callable[..., Any]:
    split = plan.pipeline is not None and plan.pipeline.schedule == "zero-bubble"

    def run(*args: Any, **kwargs: Any) -> Any:
        with splitting(split), local_ops(tp):  # the second run happens in the backward pass, outside the root's forward
            return forward(*args, **kwargs)

    called = run if split or tp is not None else forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return again(partial(called, **kwargs), *args)

    return wrapped


def compile_layers(model: nn.Module, plan: Plan) -> None:
    """Compile the forward pass of every layer, with what it recomputes; what FSDP and borders do at its ends stays outside.

    Equal layers share one compiled function, as their code does.
    """
    if plan.workload.compile:
        for name, _ in plan.layers():
            module = model.get_submodule(name)
            module.forward = torch.compile(module.forward)


def shard(model: nn.Module, plan: Plan, shards: dict[str, ParameterShards], mesh: DeviceMesh, dealing: DeviceMesh | None) -> None:
    """FSDP per layer and for the root, over `dp_shard` (and `cp`), replicated over `dp_replicate`; for experts, over `efsdp`.

    A mesh of size 1 goes the same way: FSDP then skips its collectives, and still casts parameters and keeps master weights,
    which the ZeRO level says how often to do. Only where it has nothing to do at all there is no FSDP: see `allocate`.
    """
    if not needs_fsdp(plan.mesh, plan.workload):
        return
    wrap = _wrapper(model, plan, shards, mesh, dealing)
    for module, zero in units_of(model, plan, (name for name, _ in plan.layers())):
        wrap(module, zero)
    wrap(model, plan.outer_strategy.zero)


def allocate(model: nn.Module, plan: Plan, device: torch.device) -> None:
    """Memory for a sharded model. Without FSDP its parameters' gradients are brought to their placements by hooks."""
    if needs_fsdp(plan.mesh, plan.workload):
        model.to_empty(device=device)
        return
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            if parameter.requires_grad:
                made[id(parameter)].register_hook(partial(_settled, placements=cast(DTensor, parameter).placements))
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._parameters[last] = made[id(parameter)]
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = torch.empty_like(buffer, device=device) if buffer is not None else None


def _settled(gradient: DTensor, placements: tuple[Placement, ...]) -> DTensor:
    return gradient.redistribute(placements=placements)


def shard_stages(
    root: Rank, model: nn.Module, ignored: dict[nn.Module, set[nn.Parameter]], plan: Plan,
    shards: dict[str, ParameterShards], mesh: DeviceMesh, dealing: DeviceMesh | None,
) -> dict[int, list[Unit]]:  # fmt: skip
    """The same for a pipeline rank's virtual stages: `ignored` holds the parameters that are others'."""
    wrap = _wrapper(model, plan, shards, mesh, dealing)
    outer = plan.outer_strategy.zero
    units = fsdp_units(root, plan, model)
    for number, stage in root.stages.items():
        for module, zero in units[int(number)][:-1]:
            wrap(module, zero)
        wrap(stage, outer, ignored_params=ignored[stage])
    wrap(root, outer, ignored_params=ignored[root])
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


def _wrapper(
    model: nn.Module, plan: Plan, shards: dict[str, ParameterShards], mesh: DeviceMesh, dealing: DeviceMesh | None
) -> Callable[..., None]:
    """`fully_shard` of a module, with a ZeRO level."""
    sharded = flattened(mesh, *(["dp_shard", "cp"] if plan.mesh.cp > 1 else ["dp_shard"]))
    experts = {model.get_submodule(name) for name in dealt(plan)}
    dims = {id(p): shards[name].fsdp_dim for name, p in model.named_parameters(remove_duplicate=False)}
    policy = mixed_precision(plan.workload)

    def wrap(module: nn.Module, zero: int, **options: Any) -> None:
        of, over = (dealing, dealing["efsdp"]) if dealing and module in experts else (mesh, sharded)
        fully_shard(
            module,
            mesh=beside(of["dp_replicate"], over) if plan.mesh.dp_replicate > 1 else over,
            # experts are called in the formats that their layer computes in: the router's weights often have a wider one
            mp_policy=replace(policy, cast_forward_inputs=False) if module in experts else policy,
            shard_placement_fn=lambda parameter: Shard(dims[id(parameter)]),
            reshard_after_forward=zero == 3,
            **options,
        )

    return wrap


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
