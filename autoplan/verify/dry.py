"""A dry run: every distinct rank of a plan, one after another, in this process, in a process group that answers for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from autoplan.apply import apply
from autoplan.capture import LoadedModel, capture
from autoplan.cost.model import CostModel
from autoplan.errors import UsageError
from autoplan.graph import Graph
from autoplan.plan import Plan
from autoplan.profile.catalog import find_hardware
from autoplan.units import Bytes
from autoplan.verify._torch import FakeStore, Peak, forget_meshes
from autoplan.verify.compare import DryRun, compare
from autoplan.verify.counting import Counting
from autoplan.verify.traffic import Traffic

STEPS = 2
"""The first makes the optimizer's states and warms up the pipeline; the last is counted, and the peak is that of both."""


def dry_run(plan: Plan, loaded: LoadedModel, graph: Graph | None = None) -> DryRun:
    """Run a step of `plan` on the first rank of every pipeline stage (the others of a stage do the same), compare.

    `graph` is the model's, which is captured when it isn't given. This process holds the share of one rank at a time.
    Raises `UsageError` when a process group is there already, for a model that isn't the plan's, and for everything that
    `apply` refuses.
    """
    if dist.is_initialized():
        raise UsageError("a dry run needs a process of its own: a process group is there already.")
    graph = graph or capture(loaded, compute_dtype=plan.workload.compute_dtype)
    costs = CostModel(graph, find_hardware(plan.hardware), plan.workload)
    each = plan.mesh.size // plan.mesh.pp
    found = [one_rank(plan, loaded, rank * each) for rank in range(plan.mesh.pp)]
    return compare(plan, costs, tuple(traffic for traffic, _ in found), tuple(peak for _, peak in found))


def one_rank(plan: Plan, loaded: LoadedModel, rank: int) -> tuple[Traffic, Bytes]:
    """What a rank sends in a step, and its peak."""
    with _alone(rank, plan.mesh.size), torch.random.fork_rng(devices=[]):
        parallel = apply(loaded.build, plan, device="cpu", loss_fn=loaded.loss_fn, inputs=loaded.example_inputs)
        optimizer = torch.optim.AdamW(parallel.parameters())
        peak, counting = Peak(), Counting(plan.mesh)
        peak.track_external(parallel.module, optimizer)
        batch = loaded.example_inputs(plan.micro_batch * plan.micro_batches)
        with peak, counting:
            for _ in range(STEPS):
                counting.forget()
                parallel.step(batch)
                optimizer.step()
                optimizer.zero_grad()
        return counting.traffic, peak.peak.get("cpu", 0)


@contextmanager
def _alone(rank: int, world: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        forget_meshes()
