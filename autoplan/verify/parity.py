"""Parity: the plan on real processes of this machine beside one process, loss, gradients and parameters."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from autoplan.apply import apply
from autoplan.apply.checkpoint import gathered
from autoplan.apply.loss import loss_of
from autoplan.capture import LoadedModel, load_model
from autoplan.errors import UsageError
from autoplan.plan import Plan
from autoplan.profile.ranks import join, start

STEPS = 3
TOLERANCE = 1e-4
"""Relative: float64 gives far less, but a model may bring its logits to float32 for the loss, as most do."""
SEED = 3

Result = tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]
"""Losses of all steps, gradients of the first, parameters and buffers after the last."""


@dataclass(frozen=True)
class Parity:
    """Largest differences: of losses each to its own, of gradients and parameters to the largest of the model."""

    ranks: int
    loss: float
    gradients: float
    parameters: float
    worst: str
    """Name of the gradient or parameter that differs most."""

    @property
    def agrees(self) -> bool:
        return max(self.loss, self.gradients, self.parameters) < TOLERANCE


def parity(plan: Plan, spec: str, ranks: int) -> Parity:
    """Three AdamW steps in float64 of `plan` on `ranks` gloo processes, and the same steps in this process.

    `spec` names the model, which every process builds; dropout is off. Raises `UsageError` unless the plan is for `ranks`
    devices, and with the words of a rank that failed.
    """
    check_ranks(plan, ranks)
    load = replace(plan.workload, param_dtype="float64", compute_dtype="float64", reduce_dtype="float64")
    plan = replace(plan, workload=load)
    with tempfile.TemporaryDirectory(prefix="autoplan-verify-") as folder:
        start(ranks, _train, plan, spec, folder)
        found: Result = torch.load(Path(folder) / "result")
    with wide_products():
        expected = _single(plan, load_model(spec))
    return _compare(ranks, expected, found)


def check_ranks(plan: Plan, ranks: int) -> None:
    """Raise `UsageError` unless the plan is for so many devices."""
    if plan.mesh.size != ranks:
        raise UsageError(
            f"the plan is for {plan.mesh.size} devices, not {ranks}.",
            f"Use --ranks {plan.mesh.size}, or make a plan of the same shape for {ranks}.",
        )


def _train(plan: Plan, spec: str, folder: str) -> None:
    """The steps of one rank; rank 0 writes the result."""
    torch.set_num_threads(1)
    join(torch.device("cpu"))
    with wide_products():
        found = _parallel(plan, load_model(spec))
    if dist.get_rank() == 0:
        torch.save(found, Path(folder) / "result")
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def wide_products() -> Iterator[None]:
    """While it lasts, `F.grouped_mm` takes float64 too."""
    original = F.grouped_mm
    F.grouped_mm = widened(original)
    try:
        yield
    finally:
        F.grouped_mm = original


def widened(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`F.grouped_mm`, in float64, for which it has no kernel, one product after another."""

    def grouped_mm(
        rows: torch.Tensor, matrices: torch.Tensor, *, offs: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        if rows.dtype != torch.float64 or rows.ndim != 2 or matrices.ndim != 3 or offs is None:
            return original(rows, matrices, offs=offs, **options)
        if rows.is_meta:
            return rows.new_empty(len(rows), matrices.shape[2])
        ends = offs.tolist()
        parts = [rows[start:end] @ matrix for start, end, matrix in zip([0, *ends], ends, matrices, strict=False)]
        return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], matrices.shape[2])])

    return grouped_mm


def _double(loaded: LoadedModel) -> nn.Module:
    return loaded.build().double()


def _optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-6, weight_decay=0.1)


def _batches(plan: Plan, loaded: LoadedModel) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    found = [loaded.example_inputs(plan.workload.global_batch) for _ in range(STEPS)]
    return [{name: _wide(value) for name, value in batch.items()} for batch in found]


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _parts(batch: dict[str, Any], samples: int, parts: int) -> Iterator[dict[str, Any]]:
    """The batch of `samples` samples in equal parts; what has no samples is in each."""
    size = samples // parts
    cut = {name for name, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim and len(value) == samples}
    for i in range(parts):
        yield {name: value[i * size : (i + 1) * size] if name in cut else value for name, value in batch.items()}


def _parallel(plan: Plan, loaded: LoadedModel) -> Result:
    batches = _batches(plan, loaded)
    parallel = apply(
        partial(_double, loaded), plan, device="cpu", seed=SEED, loss_fn=loaded.loss_fn, inputs=loaded.example_inputs
    )
    parallel.module.eval()
    optimizer = _optimizer(parallel.parameters())
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    for batch in batches:
        share = list(_parts(batch, plan.workload.global_batch, parallel.dp_size))[parallel.dp_rank]
        losses.append(parallel.step(share).item())
        if not gradients:
            gradients = gathered(parallel, {name: p.grad for name, p in parallel.module.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, parallel.full_state_dict()


def _single(plan: Plan, loaded: LoadedModel) -> Result:
    """The same micro-batches, one after another."""
    batches = _batches(plan, loaded)
    count = plan.workload.global_batch // plan.micro_batch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = _double(loaded).eval()
    optimizer = _optimizer(model.parameters())
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    for batch in batches:
        total = 0.0
        for part in _parts(batch, plan.workload.global_batch, count):
            loss = loss_of(model, part, part, loaded.loss_fn, None) / count
            loss.backward()
            total += loss.item()
        losses.append(total)
        if not gradients:
            gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, {name: value.clone() for name, value in model.state_dict().items()}


def _compare(ranks: int, one: Result, many: Result) -> Parity:
    loss = max(abs(a - b) / max(abs(a), 1e-30) for a, b in zip(one[0], many[0], strict=True))
    apart = [_apart(one[1], many[1]), _apart(one[2], many[2])]
    worst = max((error, name) for errors in apart for name, error in errors.items())[1]
    return Parity(ranks, loss, max(apart[0].values()), max(apart[1].values()), worst)


def _apart(one: dict[str, torch.Tensor], many: dict[str, torch.Tensor]) -> dict[str, float]:
    scale = max(value.abs().max().item() for value in one.values() if value.numel()) or 1.0
    return {
        name: (many[name] - value).abs().max().item() / scale for name, value in one.items() if name in many and value.numel()
    }
