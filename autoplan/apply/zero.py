"""What every micro-batch's backward pass does with gradients and gathered parameters, as the plan's ZeRO levels say."""

from __future__ import annotations

from collections.abc import Iterable

from torch.distributed.fsdp import FSDPModule

Unit = tuple[FSDPModule, int]
"""A module that FSDP manages, and the ZeRO level of its own parameters."""


def keeps(zero: int, shards: int) -> bool:
    """Do gathered parameters stay after the forward pass? On one device resharding is free, so it always happens."""
    return zero < 3 and shards > 1


def before_backward(units: Iterable[Unit], last: bool, shards: int) -> None:
    """Set what FSDP does in the coming backward pass; `last`: it is the last of the step.

    Under ZeRO 1 gradients stay whole, and parameters gathered, until the last. Else gradients are reduced and scattered
    over `dp_shard` at once, so that no rank keeps whole ones; over `dp_replicate` they are reduced in the last alone.
    """
    for module, zero in units:
        if zero == 1 and shards > 1:
            module.set_requires_gradient_sync(last, recurse=False)
            module.set_reshard_after_backward(last, recurse=False)
        else:
            module.set_requires_all_reduce(last, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)


def spare(units: Iterable[Unit]) -> None:
    """Let the coming backward pass, which is another virtual stage's, leave alone what these have gathered.

    FSDP ends each backward pass with all modules of its tree, whether or not they took part.
    """
    for module, _ in units:
        module.set_reshard_after_backward(False, recurse=False)


def reshard(units: Iterable[Unit]) -> None:
    """Free gathered parameters that a forward pass left behind: before parameters are read or written as shards."""
    for module, _ in units:
        module.reshard()
