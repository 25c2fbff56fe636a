"""What every micro-batch's backward pass does with gradients and gathered parameters, as the plan's ZeRO levels say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule

from autoplan.apply._torch import end_backward
from autoplan.apply.expert_parallel import dealt
from autoplan.plan import Plan

Unit = tuple[FSDPModule, int]
"""A module that FSDP manages, and the ZeRO level of its own parameters."""


def units_of(model: nn.Module, plan: Plan, layers: Iterable[str]) -> Iterator[Unit]:
    """These layers, each after the modules of experts that are dealt of it: in the order in which FSDP wraps and runs them."""
    zero = {name: strategy.zero for name, strategy in plan.layers()}
    experts = dealt(plan)
    for name in layers:
        for inner in experts:
            if inner.startswith(f"{name}."):
                yield model.get_submodule(inner), zero[name]  # type: ignore[misc]
        yield model.get_submodule(name), zero[name]  # type: ignore[misc]


def before_backward(units: Iterable[Unit], last: bool) -> None:
    """Set what FSDP does in the coming backward pass; `last`: it is the last of the step.

    Under ZeRO 1 gradients stay whole, and parameters gathered, until the last. Else gradients are reduced and scattered
    over `dp_shard` at once, so that no rank keeps whole ones; over `dp_replicate` they are reduced in the last alone.
    """
    for module, zero in units:
        if zero == 1:
            module.set_requires_gradient_sync(last, recurse=False)
            module.set_reshard_after_backward(last, recurse=False)
        else:
            module.set_requires_all_reduce(last, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)


def before_inputs(units: Iterable[Unit]) -> None:
    """Set what FSDP does in the coming backward pass, in which most weights get no gradients yet: nothing is reduced."""
    for module, zero in units:
        module.set_requires_gradient_sync(False, recurse=False)
        module.set_reshard_after_backward(zero != 1, recurse=False)


def after_weights(units: Iterable[Unit], last: bool, reduced: set[int]) -> None:
    """Reduce gradients, as `before_backward` says of a backward pass that makes them all, when those of weights have come.
    `reduced`: see `end_backward`."""
    for module, zero in units:
        if zero != 1:
            module.set_requires_gradient_sync(True, recurse=False)
        before_backward([(module, zero)], last)
        end_backward(module, zero == 1, reduced)


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
