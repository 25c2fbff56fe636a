"""What `apply` has made of a model on one rank: wrapped, sharded, split, recomputed; as plain data, to be shown."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from torch.distributed.tensor import DTensor

from autoplan.apply.model import ParallelModel
from autoplan.apply.outside import LAYER
from autoplan.apply.program import Program, Wire
from autoplan.apply.stages import holders, numbers
from autoplan.plan import zero_level
from autoplan.strategy import Layout, Recompute, Strategy
from autoplan.units import Bytes


@dataclass(frozen=True)
class Held:
    """A parameter of which this rank has a part."""

    name: str
    """Within its unit."""
    shape: tuple[int, ...]
    dtype: str
    local_shape: tuple[int, ...]
    layout: Layout
    """Over `tp`; experts' over `ep`."""
    fsdp_dim: int
    """What FSDP cuts over `dp_shard`; of experts over `efsdp`."""
    dealt: bool
    """It is experts', which are dealt over `ep`."""
    copies: tuple[int, ...]
    """The pipeline ranks that have it."""


@dataclass(frozen=True)
class Unit:
    """A module that FSDP gathers and reduces at once."""

    name: str
    """Of the layer; "" for what stands outside the layers."""
    stage: int | None
    """The virtual stage that it belongs to; None without a pipeline, and for what several stages of a rank share."""
    strategy: str
    """Its name in the plan."""
    reshard_after_forward: bool
    recomputed: Recompute
    parameters: tuple[Held, ...]


@dataclass(frozen=True)
class Crossing:
    """A tensor that goes from stage `source` to the stages up to `last`."""

    source: int
    last: int
    made_by: str
    shape: tuple[int, ...]
    """Of one micro-batch, on one rank."""
    dtype: str
    bytes: Bytes
    gradient: bool
    """Its gradient comes back."""


@dataclass(frozen=True)
class Inventory:
    """Everything of one rank."""

    rank: int
    """Of the pipeline."""
    stages: tuple[int, ...]
    units: tuple[Unit, ...]
    crossings: tuple[Crossing, ...]
    """Of the whole pipeline."""


def inventory(parallel: ParallelModel) -> Inventory:
    """What this rank has of `parallel`."""
    plan, pipeline = parallel.plan, parallel._pipeline
    rank = pipeline.rank if pipeline else 0
    stages = tuple(numbers(plan, rank))
    units = _units(parallel, pipeline.program if pipeline else None, stages)
    crossings = tuple(_crossing(wire, pipeline.program) for wire in pipeline.program.wires) if pipeline else ()
    return Inventory(rank, stages if pipeline else (), units, crossings)


def _units(parallel: ParallelModel, program: Program | None, stages: tuple[int, ...]) -> tuple[Unit, ...]:
    plan = parallel.plan
    strategy_of = {layer: run.strategy for run in plan.runs for layer in run.layers}
    stage_of = {name: number for number, names in enumerate(plan.stages) for name in names}
    held: dict[tuple[str, int | None], list[Held]] = {}
    copies = holders(program, plan) if program else {}
    for name, parameter in parallel.module.named_parameters():
        if parameter.is_meta:
            continue
        layer = next((layer for layer in strategy_of if name.startswith(f"{layer}.")), "")
        stage = stage_of[layer] if layer else None
        if program and not layer:
            using = program.readers[name] & set(stages)
            stage = min(using) if len(using) == 1 else None
        one = _held(parallel, name, parameter, copies.get(name, (0,)))
        held.setdefault((layer, stage if program else None), []).append(one)
    found = []
    for (layer, stage), parameters in held.items():
        strategy: Strategy = plan.by_name[strategy_of.get(layer, plan.outer)]
        kept = zero_level(strategy.zero, plan.mesh, plan.workload) < 3
        recomputed = strategy.recompute if layer else "none"
        start = len(layer) + 1 if layer else 0
        own = tuple(replace(one, name=one.name[start:]) for one in parameters)
        found.append(Unit(layer, stage, strategy_of.get(layer, plan.outer), not kept, recomputed, own))
    return tuple(found)


def _held(parallel: ParallelModel, name: str, parameter: nn.Parameter, copies: tuple[int, ...]) -> Held:
    shards = parallel._shards[name]
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    dtype = str(parameter.dtype).removeprefix("torch.")
    return Held(name, shards.shape, dtype, tuple(local.shape), shards.layout, shards.fsdp_dim, shards.dealt, copies)


def _crossing(wire: Wire, program: Program) -> Crossing:
    position, call, leaf = wire.site
    if call == LAYER:
        made_by = f"{program.layers[position]}, output {leaf}" if leaf else program.layers[position]
    elif position < len(program.layers):
        made_by = f"the code before {program.layers[position]}"
    else:
        made_by = "the code after the last layer"
    tensor = wire.empty()
    size = tensor.numel() * tensor.element_size()
    dtype = str(wire.dtype).removeprefix("torch.")
    return Crossing(wire.source, wire.last, made_by, wire.local_shape, dtype, size, wire.requires_grad)
