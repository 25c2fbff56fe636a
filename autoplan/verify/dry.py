"""A dry run: every distinct rank of a plan, one after another, in this process, in a process group that answers for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autoplan.apply import ParallelModel, apply
from autoplan.capture import LoadedModel, capture
from autoplan.capture.private import fake_mode
from autoplan.cost.model import CostModel
from autoplan.errors import UsageError
from autoplan.graph import Graph
from autoplan.plan import Plan
from autoplan.profile.catalog import find_hardware
from autoplan.units import BYTE, Bytes, show
from autoplan.verify._torch import FakeStore, forget_meshes, told_devices, unannounced
from autoplan.verify.compare import DryRun, compare
from autoplan.verify.counting import Counting
from autoplan.verify.kernels import as_on_gpus
from autoplan.verify.steady import sample_of, told
from autoplan.verify.traffic import Traffic

SMALL: Bytes = 2 * 2**30
"""What a rank may hold to be run with real tensors, where fake ones don't do."""


def dry_run(plan: Plan, loaded: LoadedModel, graph: Graph | None = None) -> DryRun:
    """Run a step of `plan` on the first rank of every pipeline stage (the others of a stage do the same), compare.

    `graph` is the model's, which is captured when it isn't given.
    Raises `UsageError` when a process group is there already, for a model that isn't the plan's, and for everything that
    `apply` refuses.
    """
    if dist.is_initialized():
        raise UsageError("a dry run needs a process of its own: a process group is there already.")
    graph = graph or capture(loaded, compute_dtype=plan.workload.compute_dtype)
    costs = CostModel(graph, find_hardware(plan.hardware), plan.workload)
    each = plan.mesh.size // plan.mesh.pp
    found: dict[int, tuple[Traffic, Bytes]] = {}
    notes: list[str] = []
    for stage in range(plan.mesh.pp):
        try:
            found[stage] = one_rank(plan, loaded, stage * each)
        except TooLarge as error:
            notes.append(f"{f'pipeline rank {stage}' if plan.mesh.pp > 1 else 'the step'}, {error}")
    samples = {sample_of(plan, stage) for stage in found}
    return replace(compare(plan, costs, found, tuple(notes)), ran=told(samples))


class TooLarge(Exception):
    """A rank that can't be run here; the message says why."""


def one_rank(plan: Plan, loaded: LoadedModel, rank: int) -> tuple[Traffic, Bytes]:
    """What a rank sends in a step, and its peak: without memory for any tensor, or else, if it is small, with.

    Raises `TooLarge` when it can't be run without and is too large to be run with.
    """
    try:
        return _step(plan, loaded, rank, fake_mode())
    except Exception as error:  # fake tensors have no values to branch on; what they raise then is not one kind of error
        if plan.prediction.memory.total > SMALL:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TooLarge(
                f"whose {show(plan.prediction.memory.total, BYTE)} are too much to be run here, and without them: {why}"
            ) from error
    return _step(plan, loaded, rank, nullcontext())


def _step(plan: Plan, loaded: LoadedModel, rank: int, mode: AbstractContextManager[Any]) -> tuple[Traffic, Bytes]:
    sample = sample_of(plan, rank // (plan.mesh.size // plan.mesh.pp))
    plan = replace(plan, workload=replace(plan.workload, compile=False))  # fake tensors have nothing to compile for
    with alone(rank, plan.mesh.size), told_devices(), unannounced(), torch.random.fork_rng(devices=[]):
        build, inputs = loaded.build, loaded.example_inputs
        parallel = apply(build, plan, device="cpu", loss_fn=loaded.loss_fn, inputs=inputs, allocating=mode)
        with mode, as_on_gpus():
            optimizer = OPTIMIZERS[plan.workload.optimizer](_in_groups(parallel.parameters()))
            batches = {count: inputs(plan.micro_batch * count) for count in sample.runs}
            counting = Counting(plan.mesh)
            counting.track(*parallel.module.parameters(), *parallel.module.buffers())
            seen: dict[int, Traffic] = {}
            if sample.parted:
                parallel.module.register_forward_pre_hook(partial(_begin, parallel, counting))
            with counting:
                make_states(optimizer)
                for count in sample.runs:
                    counting.forget()
                    parallel.run(batches[count], count)
                    optimizer.step()
                    optimizer.zero_grad()
                    seen[count] = counting.traffic
            if sample.parted:
                seen[sample.counts[0]] = counting.outside
        return sample.continued(seen), counting.most


def _begin(parallel: ParallelModel, counting: Counting, *_: Any) -> None:
    """A micro-batch begins; what is gathered once a step is there before the first."""
    for module, zero in parallel.units():
        if zero == 1:
            module.unshard()
    counting.mark()


def make_states(optimizer: torch.optim.Optimizer) -> None:
    """What the optimizer keeps is there from the first step that is run on: a step has been made, with gradients of zeros."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _in_groups(parameters: Iterator[nn.Parameter]) -> list[dict[str, Any]]:
    """Few at a time: DTensor's time for an operation on a list grows with the square of its length."""
    every = list(parameters)
    return [{"params": every[i : i + GROUP]} for i in range(0, len(every), GROUP)]


GROUP = 8
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adam": partial(torch.optim.Adam, fused=True),
    "sgd": torch.optim.SGD,
    "sgd_momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}


@contextmanager
def alone(rank: int, world: int) -> Iterator[None]:
    """This process is `rank` of `world`, in a process group in which nobody else is there."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        forget_meshes()
