"""A plan applied without training: what every pipeline rank gets, one after another in this process, without memory for any
tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from autoplan.apply import apply
from autoplan.apply.inventory import Inventory, inventory
from autoplan.errors import UsageError
from autoplan.plan import Plan
from autoplan.verify._torch import FakeTensorMode, told_devices
from autoplan.verify.dry import alone

if TYPE_CHECKING:
    from autoplan.capture import LoadedModel


def applied(plan: Plan, loaded: LoadedModel) -> tuple[Inventory, ...]:
    """What `apply` makes of the model on the first rank of every pipeline stage; the others of a stage hold as much.

    Raises `UsageError` when a process group is there already, and for everything that `apply` refuses.
    """
    if dist.is_initialized():
        raise UsageError("a dry run needs a process of its own: a process group is there already.")
    each = plan.mesh.size // plan.mesh.pp
    return tuple(_one(plan, loaded, stage * each) for stage in range(plan.mesh.pp))


def _one(plan: Plan, loaded: LoadedModel, rank: int) -> Inventory:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with alone(rank, plan.mesh.size), told_devices(), torch.random.fork_rng(devices=[]):
        parallel = apply(loaded.build, plan, device="cpu", loss_fn=loaded.loss_fn, inputs=loaded.example_inputs, allocating=mode)
        return inventory(parallel)
