"""Values for a model that was sharded on the meta device: every rank takes its own part, nobody sends anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from autoplan.apply.deferred import named_tensors, record
from autoplan.apply.shards import Coordinate, ParameterShards
from autoplan.errors import UsageError


@dataclass(frozen=True)
class Source:
    """A model whose parameters are on meta, and what gives their values: `values(emit)` calls `emit(name, full tensor)`."""

    model: nn.Module
    values: Callable[[Callable[[str, torch.Tensor], None]], None]


def source(model: nn.Module | Callable[[], nn.Module], param_dtype: torch.dtype, seed: int) -> Source:
    """The user's module, or what his factory makes, emptied; parameters will be kept in `param_dtype`."""
    if not isinstance(model, nn.Module):
        deferred = record(model)
        _retype(deferred.model, param_dtype)
        return Source(deferred.model, lambda emit: deferred.values(seed, emit))
    real = dict(named_tensors(model))
    on_meta = [name for name, tensor in real.items() if tensor.is_meta]
    if on_meta:
        raise UsageError(
            f"'{on_meta[0]}' is on the meta device and has no value.", "Pass the function that builds the model instead."
        )
    held = {name: tensor.detach() for name, tensor in real.items() if name not in _attributes(model)}
    _retype(model, param_dtype)
    return Source(model, lambda emit: _emit_all(held, emit))


def _emit_all(tensors: dict[str, torch.Tensor], emit: Callable[[str, torch.Tensor], None]) -> None:
    for name in list(tensors):
        emit(name, tensors.pop(name))


def _attributes(model: nn.Module) -> set[str]:
    """Names of tensors that are neither parameters nor buffers."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name for name, _ in named_tensors(model)} - known


def _retype(model: nn.Module, param_dtype: torch.dtype) -> None:
    """What `model.to(param_dtype)` does, on meta: floating-point buffers change with the parameters, if those change at all."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    changes = any(p.is_floating_point() and p.dtype != param_dtype for p in parameters.values())
    made: dict[int, torch.Tensor] = {}
    for name, tensor in [*parameters.items(), *model.named_buffers(remove_duplicate=False)]:
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        kept = tensor.dtype if not (changes and tensor.is_floating_point()) else param_dtype
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=kept, device="meta")
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if name in parameters else empty
        holder = module._parameters if name in parameters else module._buffers
        holder[last] = made[id(tensor)]  # type: ignore[assignment]


def materialize(
    found: Source, shards: dict[str, ParameterShards], at: Coordinate, device: torch.device, present: set[str] | None = None
) -> None:
    """Fill the shards and buffers of `found.model`, which have been allocated; only those named, when `present` is given."""
    model = found.model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))

    def emit(name: str, full: torch.Tensor) -> None:
        if present is not None and name not in present:
            return
        if name in parameters:
            fill(parameters[name], shards[name], at, full)
        elif name in buffers:
            buffers[name].copy_(full)
        else:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, full.clone().to(device))

    with torch.no_grad():
        found.values(emit)


def fill(parameter: torch.Tensor, shards: ParameterShards, at: Coordinate, full: torch.Tensor) -> None:
    """Copy this rank's pieces of `full` into its shard."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    for piece in shards.pieces(at):
        piece.of_local(local).copy_(piece.of_full(full))
