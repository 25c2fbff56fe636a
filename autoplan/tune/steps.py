"""A few training steps of a plan on the ranks of this process group, timed."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from autoplan.apply import ParallelModel, apply
from autoplan.calibrate.timer import Timer
from autoplan.capture import LoadedModel
from autoplan.measurement import MeasuredSteps
from autoplan.plan import Plan
from autoplan.workload import OptimizerName


def measured_steps(plan: Plan, loaded: LoadedModel, steps: int, *, warmup: int = 2, device: torch.device) -> MeasuredSteps:
    """Train `warmup + steps` steps of the plan on synthetic inputs; every rank calls this and gets the same.

    The model is gone afterwards, its process groups stay.
    Raises `UsageError` for a plan that can't be applied here.
    """
    parallel = apply(loaded.build, plan, device=device, loss_fn=loaded.loss_fn, inputs=loaded.example_inputs)
    optimizer = optimizer_of(plan.workload.optimizer, list(parallel.parameters()))
    timer = Timer("steps.json", warmup=warmup, plan=plan)
    for step in range(warmup + steps):
        batch = _batch(loaded, parallel, step, device)
        dist.barrier()
        with timer.step():
            parallel.step(batch)
            optimizer.step()
            optimizer.zero_grad()
    found = timer.measured()
    del parallel, optimizer, batch
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def optimizer_of(name: OptimizerName, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that a workload names, its kernels fused: what the cost model prices."""
    if name in ("adamw", "adam"):
        kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        return kind(parameters, lr=1e-5, fused=True)
    return torch.optim.SGD(parameters, lr=1e-5, momentum=0.9 if name == "sgd_momentum" else 0.0, fused=True)


def _batch(loaded: LoadedModel, parallel: ParallelModel, step: int, device: torch.device) -> dict[str, Any]:
    """This dp rank's share of a global batch; all stages of a pipeline and all of a tp group get the same."""
    size = parallel.plan.workload.global_batch // parallel.dp_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step * parallel.dp_size + parallel.dp_rank)
        inputs = loaded.example_inputs(size)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
