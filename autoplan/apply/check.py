"""Does the plan fit this module and this launch? Every rank finds the same answer, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from autoplan.apply.expert_parallel import dealt
from autoplan.apply.shards import ParameterShards
from autoplan.errors import UsageError
from autoplan.plan import Plan, spread_over
from autoplan.schedule import order
from autoplan.strategy import REPLICATE, Experts, Layout, Sharding, expert_cut, shard

_REPLAN = "The plan was made for another model: plan this one."


def check_world(plan: Plan, world: int) -> None:
    """Raise `UsageError` unless `world` processes are what the plan wants."""
    wanted = plan.mesh.size
    if world != wanted:
        raise UsageError(
            f"the plan wants {wanted} device{'s' if wanted > 1 else ''} ({plan.mesh}), torchrun started {world}.",
            f"Start torchrun with {wanted} processes, or make a plan for {world}.",
        )


def check_pipeline(plan: Plan) -> None:
    """Raise `UsageError` unless the pipeline fits the mesh and its schedule the micro-batches."""
    pipeline = plan.pipeline
    if (pipeline is None) != (plan.mesh.pp == 1):
        raise UsageError(
            f"the plan has pp {plan.mesh.pp} and {'no' if pipeline is None else 'a'} pipeline.", "A plan has both or neither."
        )
    if pipeline is None:
        return
    names = [name for name, _ in plan.layers()]
    unknown = [name for name in pipeline.split_before if name not in names]
    if unknown:
        raise UsageError(f"the plan splits before '{unknown[0]}', which is no layer of it.", "Name layers of the plan.")
    if len(plan.stages) != plan.mesh.pp * pipeline.chunks or not all(plan.stages):
        raise UsageError(
            f"the plan cuts the layers into {len(plan.stages)} stages, where pp {plan.mesh.pp} with {pipeline.chunks} "
            f"chunk{'s' if pipeline.chunks > 1 else ''} a rank needs {plan.mesh.pp * pipeline.chunks}.",
            "Split before as many layers as there are stages, less one.",
        )
    order(pipeline.schedule, 0, plan.mesh.pp, plan.micro_batches, pipeline.chunks)


def check_compiled(plan: Plan) -> None:
    """Raise `UsageError` where the plan compiles layers that can't be."""
    axis = spread_over(plan.mesh)
    split = plan.pipeline is not None and plan.pipeline.schedule == "zero-bubble"
    if plan.workload.compile and (axis or split):
        what = f"are spread over {axis}" if axis else "run under zero-bubble"
        raise UsageError(f"the plan compiles layers that {what}, which is not done.", "Set workload.compile to false.")


def parameter_shards(model: nn.Module, plan: Plan) -> dict[str, ParameterShards]:
    """How every parameter of `model` is cut, tied names included. Raises `UsageError` when plan and model do not fit."""
    layouts = _layouts(model, plan)
    experts = dict(_experts(model, plan))
    shards: dict[str, ParameterShards] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = tuple(parameter.shape)
        if not shape:
            raise UsageError(f"parameter '{name}' is a scalar, which FSDP can't hold.", "Give it the shape [1].")
        if name in experts:
            shards[name] = _dealt(name, shape, experts[name], plan)
            continue
        layout = layouts.get(name, REPLICATE) if plan.mesh.tp > 1 else REPLICATE
        _check_layout(name, shape, layout, plan)
        shards[name] = ParameterShards(shape, layout, _fsdp_dim(name, shape, layout, plan))
    return shards


def _layouts(model: nn.Module, plan: Plan) -> dict[str, Layout]:
    """Layout by full parameter name, as the outer strategy and the layers' say; tied names share it."""
    for name, _ in plan.layers():
        _submodule(model, name)
    found: dict[str, Layout] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for prefix, sharding in _members(plan):
        for name, layout in sharding.parameters:
            full = f"{prefix}{name}"
            if full not in parameters:
                raise UsageError(f"the plan places parameter '{full}', which the model doesn't have.", _REPLAN)
            found[full] = layout
        for border in sharding.borders:
            _submodule(model, ".".join(filter(None, (prefix.rstrip("."), border.module))))
    for group in _tied(parameters):
        named = {found[name] for name in group if name in found}
        if len(named) > 1:
            raise UsageError(f"the plan places the tied parameters {', '.join(group)} differently.", "Give them one layout.")
        found.update({name: layout for name in group for layout in named})
    return found


def _experts(model: nn.Module, plan: Plan) -> Iterator[tuple[str, Experts]]:
    """By full parameter name, tied names included: whose experts it holds."""
    for module, experts in dealt(plan).items():
        for name, _ in _submodule(model, module).named_parameters(remove_duplicate=False):
            yield f"{module}.{name}", experts


def _dealt(name: str, shape: tuple[int, ...], experts: Experts, plan: Plan) -> ParameterShards:
    if shape[0] != experts.number or len(shape) < 2:
        raise UsageError(f"the plan deals {experts.number} experts of parameter '{name}', which is {list(shape)}.", _REPLAN)
    if experts.number % plan.mesh.ep:
        raise UsageError(f"the {experts.number} experts of '{name}' can't be dealt over ep {plan.mesh.ep}.", _REPLAN)
    local = (shape[0] // plan.mesh.ep, *shape[1:])
    return ParameterShards(shape, shard(0), expert_cut(local, plan.mesh.efsdp), dealt=True)


def _members(plan: Plan) -> Iterator[tuple[str, Sharding]]:
    yield "", plan.outer_strategy.sharding
    for name, strategy in plan.layers():
        yield f"{name}.", strategy.sharding


def _tied(parameters: dict[str, nn.Parameter]) -> Iterator[list[str]]:
    by_id: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        by_id.setdefault(id(parameter), []).append(name)
    return (names for names in by_id.values() if len(names) > 1)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UsageError(f"the plan names the module '{name}', which the model doesn't have.", _REPLAN) from None


def _check_layout(name: str, shape: tuple[int, ...], layout: Layout, plan: Plan) -> None:
    if layout.kind == "partial":
        raise UsageError(f"the plan makes parameter '{name}' Partial.", "A parameter is replicated or sharded.")
    if not layout.sharded:
        return
    parts = layout.blocks * plan.mesh.tp
    if layout.dim >= len(shape) or shape[layout.dim] % parts:
        wanted = f"{layout.blocks} x {plan.mesh.tp}" if layout.blocks > 1 else str(plan.mesh.tp)
        raise UsageError(f"dim {layout.dim} of parameter '{name}' {list(shape)} can't be cut into {wanted} equal parts.", _REPLAN)
    if layout.blocks > 1 and len(shape) != 2:
        raise UsageError(f"packed parameter '{name}' {list(shape)} has no second dim.", "Place a packed bias Replicate|Partial.")


def _fsdp_dim(name: str, shape: tuple[int, ...], layout: Layout, plan: Plan) -> int:
    """The dim that FSDP cuts: 0, but the free one of a packed weight, whose dim 0 FSDP can't describe twice."""
    if layout.blocks == 1:
        return 0
    dim = 1 - layout.dim
    if shape[dim] % plan.mesh.shards:
        cp = f" x cp {plan.mesh.cp}" if plan.mesh.cp > 1 else ""
        raise UsageError(
            f"dim {dim} of packed parameter '{name}' {list(shape)} isn't divisible by dp_shard {plan.mesh.dp_shard}{cp}."
        )
    return dim
