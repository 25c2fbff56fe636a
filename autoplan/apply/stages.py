"""What one rank of a pipeline holds: its virtual stages' layers, and what those use of the parameters outside the layers.

FSDP wants a tree of modules whose forward passes run one inside the other. The user's own root is not that: most of it
belongs to other ranks. So a rank gets a tree of its own, `Rank` -> `Stage` -> layers, in which a `Shell` stands for a
module outside the layers: an empty module that shares its table of parameters, so that what FSDP does to a parameter of
the shell happens to the user's module. Names and the user's modules stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from autoplan.apply.deferred import named_tensors
from autoplan.apply.program import Program
from autoplan.apply.zero import Unit, units_of
from autoplan.plan import Plan

Run = Callable[[int, tuple[torch.Tensor, ...], dict[str, Any], dict[str, Any]], tuple[torch.Tensor, ...]]
"""(virtual stage, received, arguments of the forward, batch for the loss) -> what is sent, or the loss."""


class Unseen:
    """A batch that FSDP neither moves nor casts: it looks into containers, not into objects."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch = batch


class Shell(nn.Module):
    """Shares the parameters, themselves and not only their values, of `owner`."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.__dict__["_parameters"] = owner._parameters


class Stage(nn.Module):
    """One virtual stage."""

    def __init__(self, number: int, layers: list[nn.Module], shells: list[Shell], run: Run) -> None:
        super().__init__()
        self.number = number
        self.layers = nn.ModuleList(layers)
        self.shells = nn.ModuleList(shells)
        self._run = run

    def forward(self, received: tuple[torch.Tensor, ...], inputs: dict[str, Any], batch: Unseen) -> tuple[torch.Tensor, ...]:
        return self._run(self.number, received, inputs, batch.batch)


class Rank(nn.Module):
    """All virtual stages of a rank; has itself the parameters that several of them use."""

    def __init__(self, stages: dict[int, Stage], shells: list[Shell]) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({str(number): stage for number, stage in stages.items()})
        self.shells = nn.ModuleList(shells)

    def forward(
        self, number: int, received: tuple[torch.Tensor, ...], inputs: dict[str, Any], batch: Unseen
    ) -> tuple[torch.Tensor, ...]:
        output: tuple[torch.Tensor, ...] = self.stages[str(number)](received, inputs, batch)
        return output


def numbers(plan: Plan, rank: int) -> list[int]:
    """The virtual stages of a pipeline rank."""
    return list(range(rank, len(plan.stages), plan.mesh.pp))


def holders(program: Program, plan: Plan) -> dict[str, tuple[int, ...]]:
    """By name of a parameter: the pipeline ranks that have it, in order."""
    return {name: tuple(sorted({stage % plan.mesh.pp for stage in stages})) for name, stages in program.readers.items()}


def build(model: nn.Module, plan: Plan, program: Program, rank: int, run: Run) -> tuple[Rank, dict[nn.Module, set[nn.Parameter]]]:
    """The tree of `rank`, and of each of its `Stage`s and itself the parameters that FSDP must leave to others."""
    mine = numbers(plan, rank)
    inside = {id(p) for names in plan.stages for name in names for p in model.get_submodule(name).parameters()}
    users: dict[nn.Parameter, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in inside:
            users[parameter] = set(program.readers[name]) & set(mine)
    stages: dict[int, Stage] = {}
    own: dict[nn.Module, set[nn.Parameter]] = {}
    for number in mine:
        wanted = {parameter for parameter, used in users.items() if used == {number}}
        layers = [model.get_submodule(name) for name in plan.stages[number]]
        stages[number] = Stage(number, layers, list(_shells(model, wanted)), run)
        own[stages[number]] = wanted
    shared = {parameter for parameter, used in users.items() if len(used) > 1}
    root = Rank(stages, list(_shells(model, shared)))
    own[root] = shared
    return root, {module: set(users) - wanted for module, wanted in own.items()}


def _shells(model: nn.Module, wanted: set[nn.Parameter]) -> Iterator[Shell]:
    for module in model.modules():
        if any(parameter in wanted for parameter in module._parameters.values()):
            yield Shell(module)


def allocate(root: Rank, model: nn.Module, present: set[str], device: torch.device) -> None:
    """Memory for the parameters named `present`, the buffers of this rank's layers and those outside all layers."""
    others = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name not in present}
    root._apply(lambda tensor: tensor if id(tensor) in others else torch.empty_like(tensor, device=device))
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if name in present and buffer.is_meta:
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._buffers[last] = torch.empty_like(buffer, device=device)


def present(model: nn.Module, plan: Plan, program: Program, rank: int) -> set[str]:
    """Names of the parameters, buffers and other tensors that a rank holds."""
    has = {name for name, ranks in holders(program, plan).items() if rank in ranks}
    elsewhere = tuple(f"{name}." for number, names in enumerate(plan.stages) if number % plan.mesh.pp != rank for name in names)
    tables = {name for name, _ in named_tensors(model) if name not in program.readers}
    return has | {name for name in tables if not name.startswith(elsewhere)}


def fsdp_units(root: Rank, plan: Plan, model: nn.Module) -> dict[int, list[Unit]]:
    """By virtual stage: its FSDP modules, the stage itself last, each with its ZeRO level."""
    return {
        int(key): [*units_of(model, plan, plan.stages[int(key)]), (stage, plan.outer_strategy.zero)]  # type: ignore[list-item]
        for key, stage in root.stages.items()
    }
