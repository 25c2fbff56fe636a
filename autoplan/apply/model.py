"""`ParallelModel`: what a training loop holds instead of the module, when it wants a whole step, clipping or checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autoplan.apply import checkpoint, weights
from autoplan.apply.lifeline import lifeline
from autoplan.apply.loss import LossFn, loss_of
from autoplan.apply.pipeline import Pipeline
from autoplan.apply.shards import Coordinate, ParameterShards
from autoplan.apply.tied import Tied
from autoplan.apply.zero import Unit, before_backward, reshard, units_of
from autoplan.errors import UsageError
from autoplan.plan import Plan, needs_fsdp


class ParallelModel:
    """A module that runs in parallel. Call it as the module; `module` is the user's own object."""

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        mesh: DeviceMesh,
        shards: dict[str, ParameterShards],
        at: Coordinate,
        loss_fn: LossFn | None,
        pipeline: Pipeline | None = None,
        spread: DeviceMesh | None = None,
    ) -> None:
        self.module = module
        self.plan = plan
        self.mesh = mesh
        self.dp_size = plan.mesh.dp
        self.dp_rank: int = mesh.get_local_rank("dp_replicate") * plan.mesh.dp_shard + mesh.get_local_rank("dp_shard")
        self._shards = shards
        self._at = at
        self._loss_fn = loss_fn
        self._pipeline = pipeline
        self._spread = spread
        self._tied = Tied(module, pipeline, mesh) if pipeline is not None else None
        self._lifeline = lifeline()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._pipeline is not None:
            raise UsageError(
                "a model that is cut into pipeline stages can't be called.", "Use ParallelModel.step, which runs whole steps."
            )
        return self.module(*args, **kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's shards, for the optimizer; in a pipeline those of its stages alone."""
        return (parameter for parameter in self.module.parameters() if not parameter.is_meta)

    def step(self, batch: dict[str, Any]) -> torch.Tensor:
        """Forward and backward of this dp rank's share of a batch, in micro-batches; returns the mean loss over all ranks.

        `batch` holds the keyword arguments of the module's forward, `plan.micro_batch * plan.micro_batches` samples of
        each; every stage of a pipeline is given the same. What is reduced when is said in `zero`. The optimizer is the
        caller's.
        """
        return self.run(batch, self.plan.micro_batches)

    def run(self, batch: dict[str, Any], count: int) -> torch.Tensor:
        """`step` with another number of micro-batches than the plan's: it can be that of a smaller last batch."""
        micro_batches = list(self._micro_batches(batch, count))
        with self._watch("a step"):
            if self._pipeline is None:
                total = self._accumulate(micro_batches)
            else:
                total = self._pipeline.step(micro_batches)
                assert self._tied is not None
                self._tied.add_gradients()
            return self._mean(total)

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Any]) -> torch.Tensor:
        """The mean loss over all ranks, of modules in evaluation mode; there are no gradients, and all modes are put back.

        `batch` is as in `step`, but may hold any number of micro-batches, the same number on every rank.
        """
        sizes = [len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim]
        micro_batches = list(self._micro_batches(batch, max(1, max(sizes, default=0) // self.plan.micro_batch)))
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        try:
            with self._watch("an evaluation"):
                if self._pipeline is None:
                    losses = [self._loss(micro_batch) / len(micro_batches) for micro_batch in micro_batches]
                    total = torch.stack(losses).sum()
                else:
                    total = self._pipeline.evaluate(micro_batches)
                return self._mean(total)
        finally:
            reshard(self.units())
            for module, training in modes:
                module.training = training

    def _watch(self, doing: str) -> AbstractContextManager[None]:
        """If another rank ends meanwhile, this one does too, with an error that names it."""
        return self._lifeline.watch(doing, self._device) if self._lifeline is not None else nullcontext()

    def _mean(self, total: torch.Tensor) -> torch.Tensor:
        """Over all data-parallel ranks, of a pipeline's the last stage's; on every rank."""
        if self._pipeline is not None:
            dist.all_reduce(total, group=self._pipeline.group)
        if self.dp_size > 1:
            for axis in ("dp_replicate", "dp_shard"):
                if getattr(self.plan.mesh, axis) > 1:
                    dist.all_reduce(total, group=self.mesh.get_group(axis))
        return total / self.dp_size

    def _accumulate(self, micro_batches: list[dict[str, Any]]) -> torch.Tensor:
        units, losses = self.units(), []
        for i, micro_batch in enumerate(micro_batches):
            # not told that there will be others, FSDP lets go of its last buffer after every one
            before_backward(units, i == len(micro_batches) - 1)
            loss = self._loss(micro_batch) / len(micro_batches)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def units(self) -> list[Unit]:
        """Everything that FSDP manages."""
        if self._pipeline is not None:
            return self._pipeline.units
        if not needs_fsdp(self.plan.mesh, self.plan.workload):
            return []
        layers = units_of(self.module, self.plan, (name for name, _ in self.plan.layers()))
        return [*layers, (self.module, self.plan.outer_strategy.zero)]  # type: ignore[list-item]

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
        return loss_of(self.module, batch, batch, self._loss_fn, self._spread)

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their 2-norm over the whole model is at most `max_norm`; returns the norm before."""
        held = [parameter for parameter in self.parameters() if parameter.grad is not None]
        locals_ = [cast(DTensor, parameter.grad).to_local() for parameter in held]
        norms = torch._foreach_norm(locals_) if locals_ else ()
        parts = [norm.double() ** 2 / self._copies(parameter) for norm, parameter in zip(norms, held, strict=True)]
        squares = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=self._device)
        dist.all_reduce(squares)
        norm = squares.sqrt()
        if locals_:
            torch._foreach_mul_(locals_, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(locals_[0].dtype))
        return norm

    def _copies(self, parameter: nn.Parameter) -> int:
        """How many ranks hold the same numbers of a parameter's gradient."""
        gradient = cast(DTensor, parameter.grad)
        copies = 1 if self._tied is None else self._tied.copies(parameter)
        for axis, placement in enumerate(gradient.placements):
            if placement.is_replicate():
                copies *= gradient.device_mesh.size(axis)
        return copies

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The whole model's `state_dict` as plain CPU tensors, on every rank (all ranks must call it)."""
        reshard(self.units())
        with self._watch("gathering the model"):
            return checkpoint.gathered(self, self.module.state_dict())

    def save(self, path: str | Path, optimizer: torch.optim.Optimizer | None = None, step: int = 0) -> None:
        """Write a distributed checkpoint to the folder `path`; until it is complete, one that is there stays."""
        reshard(self.units())
        with self._watch("saving a checkpoint"):
            checkpoint.save(self, Path(path), optimizer, step)

    def load(self, path: str | Path, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Read a checkpoint of this model, saved under any plan; returns the step that it was saved at."""
        reshard(self.units())
        with self._watch("loading a checkpoint"):
            return checkpoint.load(self, Path(path), optimizer)

    def save_weights(self, path: str | Path) -> None:
        """Write the whole model's weights into the folder `path` as safetensors, which Hugging Face's `from_pretrained` reads."""
        reshard(self.units())
        with self._watch("writing the weights"):
            weights.save(self, Path(path))

    def load_weights(self, path: str | Path) -> None:
        """Read weights from a safetensors file, or a folder as Hugging Face writes it; every rank reads its own pieces.

        Raises `UsageError` when they are another model's, or there are none.
        """
        reshard(self.units())
        with self._watch("reading the weights"):
            weights.load(self, Path(path))
