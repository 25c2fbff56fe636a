"""Parameters of a pipeline's ranks: who has which, and those that several have (tied embeddings).

A copy starts with the same value on every rank that has it, and once a step the gradients of all copies are added up.
So the copies stay equal, and a checkpoint needs one of them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autoplan.apply.pipeline import Pipeline
from autoplan.apply.stages import holders


class Tied:
    """What the ranks of one pipeline share."""

    def __init__(self, model: nn.Module, pipeline: Pipeline, mesh: DeviceMesh) -> None:
        self.group = pipeline.group
        self.rank = pipeline.rank
        self.holders = holders(pipeline.program, pipeline.plan)
        """Pipeline ranks by name of a parameter."""
        self._layers = {
            f"{name}.": number % pipeline.plan.mesh.pp for number, names in enumerate(pipeline.plan.stages) for name in names
        }
        groups = self._groups(mesh)
        self._shared = [
            (parameter, groups[self.holders[name]])
            for name, parameter in model.named_parameters()
            if not parameter.is_meta and len(self.holders[name]) > 1
        ]
        self._copies = {parameter: len(self.holders[name]) for name, parameter in model.named_parameters()}

    def _groups(self, mesh: DeviceMesh) -> dict[tuple[int, ...], Any]:
        """A process group for each set of ranks that share a parameter: those of all pipelines, since all ranks must ask."""
        found: dict[tuple[int, ...], Any] = {}
        pipelines = mesh.mesh.reshape(mesh["pp"].size(), -1).T.tolist()
        for ranks in sorted(set(self.holders.values())):
            if len(ranks) == mesh["pp"].size():
                found[ranks] = self.group
            elif len(ranks) > 1:
                for pipeline in pipelines:
                    members = [pipeline[rank] for rank in ranks]
                    group = dist.new_group(members)
                    if dist.get_rank() in members:
                        found[ranks] = group
        return found

    def copies(self, parameter: nn.Parameter) -> int:
        """How many ranks of a pipeline have it."""
        return self._copies[parameter]

    def add_gradients(self) -> None:
        """Every copy's gradient becomes the sum of all."""
        for parameter, group in self._shared:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(cast(DTensor, parameter.grad).to_local(), group=group)

    def owner(self, name: str) -> int:
        """The rank that answers for a parameter or buffer."""
        if name in self.holders:
            return self.holders[name][0]
        return next((rank for prefix, rank in self._layers.items() if name.startswith(prefix)), 0)
