"""What a pipeline must know of a model's forward pass: who runs what, and which tensors go from stage to stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Placement

from autoplan.apply.outside import Site
from autoplan.errors import UsageError
from autoplan.plan import Plan


@dataclass(frozen=True)
class Wire:
    """A tensor that stage `source` makes and stages up to `last` use; those between pass it on."""

    site: Site
    source: int
    last: int
    local_shape: tuple[int, ...]
    """Of what one rank sends."""
    dtype: torch.dtype
    requires_grad: bool
    placements: tuple[Placement, ...] | None
    """Over the tp axis; None for a plain tensor."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def fits(self, tensor: torch.Tensor) -> bool:
        """Is the tensor what the other stage expects?"""
        placements = tuple(tensor.placements) if isinstance(tensor, DTensor) else None
        return (tuple(tensor.shape), tensor.dtype, placements) == (self.shape, self.dtype, self.placements)

    def empty(self) -> torch.Tensor:
        """A meta tensor of the size of what is sent."""
        tensor = torch.empty(self.local_shape, dtype=self.dtype, device="meta")
        return tensor.requires_grad_(self.requires_grad)


@dataclass(frozen=True, eq=False)
class Program:
    """The forward pass of a model, cut into virtual stages."""

    stages: tuple[int, ...]
    """The stage of every position: of every layer as it is called, and of what follows the last."""
    layers: tuple[str, ...]
    """Names in the order in which they are called."""
    outputs: tuple[Any, ...]
    """What every call of a layer returns, with meta tensors."""
    wires: tuple[Wire, ...]
    readers: dict[str, frozenset[int]]
    """By name of a parameter, tied names each: the stages that use it."""
    loss: torch.dtype

    def incoming(self, stage: int) -> tuple[Wire, ...]:
        """What a stage receives from the one before it, in the order in which it is sent."""
        return tuple(wire for wire in self.wires if wire.source < stage <= wire.last)

    def outgoing(self, stage: int) -> tuple[Wire, ...]:
        return tuple(wire for wire in self.wires if wire.source <= stage < wire.last)


def positions(plan: Plan, layers: list[str]) -> tuple[int, ...]:
    """The stage of every position. Raises `UsageError` when the model's order is not the plan's."""
    stage_of = {name: stage for stage, names in enumerate(plan.stages) for name in names}
    missing = [name for name in stage_of if name not in layers]
    if missing:
        raise UsageError(f"the forward pass doesn't call layer '{missing[0]}', so that a pipeline can't be cut.", CUT)
    stages = [stage_of[name] for name in layers]
    for before, after, stage, following in zip(layers, layers[1:], stages, stages[1:], strict=False):
        if following < stage:
            raise UsageError(f"the forward pass calls '{after}' of stage {following} after '{before}' of stage {stage}.", CUT)
    return (*stages, len(plan.stages) - 1)


def wires(stages: tuple[int, ...], tensors: dict[Site, torch.Tensor], reads: Iterable[tuple[Site, int]]) -> Iterator[Wire]:
    """Every tensor that is read in a later stage than it is made in."""
    last: dict[Site, int] = {}
    for site, position in reads:
        last[site] = max(last.get(site, 0), stages[position])
    for site in sorted(last):
        if last[site] > stages[site.position]:
            yield _wire(site, stages[site.position], last[site], tensors[site])


def _wire(site: Site, source: int, last: int, tensor: torch.Tensor) -> Wire:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return Wire(
        site=site,
        source=source,
        last=last,
        local_shape=tuple(local.shape),
        dtype=tensor.dtype,
        requires_grad=tensor.requires_grad,
        placements=tuple(tensor.placements) if isinstance(tensor, DTensor) else None,
        shape=tuple(tensor.shape),
        stride=torch.empty(tensor.shape, device="meta").stride(),
    )


CUT = "Make the plan without pp, or cut it elsewhere."
