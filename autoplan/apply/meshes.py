"""Meshes of devices. Plans that follow one another in a process share those that are alike: each has process groups, and a
process group has connections and threads until the process ends."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autoplan.apply.expert_parallel import dealt
from autoplan.plan import Plan
from autoplan.strategy import AXES

Axes = dict[str, int]

_made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[str, tuple[tuple[str, int], ...]], DeviceMesh]] = WeakKeyDictionary()
"""By the process group of all, with which their own end."""


def mesh_of(plan: Plan, device: torch.device) -> DeviceMesh:
    """All axes that a parameter or a batch is cut over, and those of pp and cp that there are."""
    return _mesh(device, {axis: getattr(plan.mesh, axis) for axis in AXES if _is_there(plan, axis)})


def _is_there(plan: Plan, axis: str) -> bool:
    return axis not in ("pp", "cp") or getattr(plan.mesh, axis) > 1


def dealing_mesh_of(plan: Plan, device: torch.device) -> DeviceMesh | None:
    """dp_shard x cp x tp seen as efsdp x ep. Parameters over ep that FSDP cuts over efsdp need both of one mesh."""
    if not dealt(plan):
        return None
    return _mesh(device, {axis: getattr(plan.mesh, axis) for axis in ("pp", "dp_replicate", "efsdp", "ep")})


def _mesh(device: torch.device, axes: Axes) -> DeviceMesh:
    made = _made.setdefault(dist.group.WORLD, {})  # type: ignore[arg-type]
    key = device.type, tuple(axes.items())
    if key not in made:
        made[key] = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    return made[key]
