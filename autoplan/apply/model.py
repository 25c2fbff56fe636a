"""`ParallelModel`: what a training loop holds instead of the module, when it wants a whole step, clipping or checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from autoplan.apply import checkpoint
from autoplan.apply.local_ops import local_ops
from autoplan.apply.shards import Coordinate, ParameterShards
from autoplan.apply.tensor_parallel import plain
from autoplan.errors import UsageError
from autoplan.plan import Plan


class ParallelModel:
    """A module that runs in parallel. Call it as the module; `module` is the user's own object."""

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        mesh: DeviceMesh,
        shards: dict[str, ParameterShards],
        at: Coordinate,
        loss_fn: Callable[[Any, dict[str, Any]], torch.Tensor] | None,
    ) -> None:
        self.module = module
        self.plan = plan
        self.mesh = mesh
        self.dp_size = plan.mesh.dp
        self.dp_rank: int = mesh.get_local_rank("dp_replicate") * plan.mesh.dp_shard + at.dp_shard
        self._shards = shards
        self._at = at
        self._loss_fn = loss_fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's shards, for the optimizer."""
        return self.module.parameters()

    def step(self, batch: dict[str, Any]) -> torch.Tensor:
        """Forward and backward of this dp rank's share of a batch, in micro-batches; returns the mean loss over all ranks.

        `batch` holds the keyword arguments of the module's forward, `plan.micro_batch * plan.micro_batches` samples of
        each. Gradients are reduced and scattered over `dp_shard` in every micro-batch, so that no rank ever keeps whole
        ones, and over `dp_replicate` once, in the last. The optimizer is the caller's.
        """
        root = cast(FSDPModule, self.module)
        count = self.plan.micro_batches
        total: torch.Tensor | None = None
        for i, micro_batch in enumerate(self._micro_batches(batch, count)):
            last = i == count - 1
            root.set_is_last_backward(last)
            root.set_requires_all_reduce(last)
            loss = self._loss(micro_batch) / count
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        mean = total.clone()
        if self.dp_size > 1:
            for axis in ("dp_replicate", "dp_shard"):
                dist.all_reduce(mean, group=self.mesh.get_group(axis))
        return mean / self.dp_size

    def _micro_batches(self, batch: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
        size = self.plan.micro_batch * count
        samples = {name for name, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim and len(value) == size}
        if not samples:
            given = ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items() if isinstance(value, torch.Tensor))
            raise UsageError(
                f"step was given {given}; the plan runs {size} samples on each dp rank.",
                f"Give each of the {self.dp_size} dp ranks its share of the {self.plan.workload.global_batch} samples.",
            )
        for i in range(count):
            part = slice(i * self.plan.micro_batch, (i + 1) * self.plan.micro_batch)
            yield {name: value[part] if name in samples else value for name, value in batch.items()}

    def _loss(self, batch: dict[str, Any]) -> torch.Tensor:
        output = self.module(**batch)
        if self._loss_fn is not None:
            with local_ops(self.mesh["tp"]):
                output = self._loss_fn(output, batch)
        loss = output if isinstance(output, torch.Tensor) else getattr(output, "loss", None)
        if not isinstance(loss, torch.Tensor) or loss.ndim:
            raise UsageError("the model returns no scalar loss.", "Pass loss_fn(output, batch) to autoplan.apply.")
        return plain(loss) if isinstance(loss, DTensor) else loss

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their 2-norm over the whole model is at most `max_norm`; returns the norm before."""
        gradients = [cast(DTensor, p.grad) for p in self.parameters() if p.grad is not None]
        locals_ = [gradient.to_local() for gradient in gradients]
        norms = torch._foreach_norm(locals_)
        copies = [_copies(gradient) for gradient in gradients]
        squares = torch.stack([norm.double() ** 2 / n for norm, n in zip(norms, copies, strict=True)]).sum()
        dist.all_reduce(squares)
        norm = squares.sqrt()
        torch._foreach_mul_(locals_, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(locals_[0].dtype))
        return norm

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The whole model's `state_dict` as plain CPU tensors, on every rank (all ranks must call it)."""
        return {name: checkpoint.full(self, name, tensor) for name, tensor in self.module.state_dict().items()}

    def save(self, path: str | Path, optimizer: torch.optim.Optimizer | None = None, step: int = 0) -> None:
        """Write a distributed checkpoint to the folder `path`; until it is complete, one that is there stays."""
        checkpoint.save(self, Path(path), optimizer, step)

    def load(self, path: str | Path, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Read a checkpoint of this model, saved under any plan; returns the step that it was saved at."""
        return checkpoint.load(self, Path(path), optimizer)


def _copies(gradient: DTensor) -> int:
    """How many ranks of the gradient's mesh hold the same numbers."""
    copies = 1
    for axis, placement in enumerate(gradient.placements):
        if placement.is_replicate():
            copies *= gradient.device_mesh.size(axis)
    return copies
