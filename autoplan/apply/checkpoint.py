"""Distributed checkpoints that any other plan can load: every rank writes its pieces under their place in the full tensor.

DTensor could describe its own place to `torch.distributed.checkpoint`, except for packed weights (their share is several
rectangles). One arithmetic for all, `shards.pieces`, is simpler than two. Keys are the model's own names; optimizer
states are `optimizer.<parameter>.<state>`, so that a checkpoint knows nothing of the plan, or the order of parameters.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as read
from torch.distributed.checkpoint.state_dict_saver import save as write
from torch.distributed.tensor import DTensor

from autoplan.apply.shards import Piece
from autoplan.errors import UsageError
from autoplan.units import Bytes

if TYPE_CHECKING:
    from autoplan.apply.model import ParallelModel

_STEP = "autoplan.step"
_GROUPS = "autoplan.param_groups"
TOGETHER: Bytes = 2**26
"""At most so much is gathered at once, unless one tensor is larger."""


class Pieces(torch.Tensor):
    """A rank's shard as `torch.distributed.checkpoint` wants to see it: rectangles of a full tensor."""

    _local: torch.Tensor
    _pieces: list[Piece]

    @staticmethod
    def __new__(cls, local: torch.Tensor, shape: tuple[int, ...], pieces: list[Piece]) -> Pieces:
        self: Pieces = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=local.dtype, device=local.device)
        self._local, self._pieces = local, pieces
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} on the pieces of a checkpoint")

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._local)
        return [
            WriteItem(
                MetadataIndex(fqn, torch.Size(piece.offset)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for piece, chunk in zip(self._pieces, self.__create_chunk_list__(), strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.sizes)) for piece in self._pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        piece = next(piece for piece in self._pieces if torch.Size(piece.offset) == index.offset)
        return piece.of_local(self._local)


def save(model: ParallelModel, path: Path, optimizer: torch.optim.Optimizer | None, step: int) -> None:
    """Write to a folder beside `path`, then put it in its place."""
    states: dict[str, Any] = {_STEP: torch.tensor(step)}
    for name, tensor in model.module.state_dict().items():
        if not tensor.is_meta:  # else it is another pipeline stage's
            states[name] = _pieces(model, name, tensor)
    if optimizer is not None:
        names = _names(model)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for key, value in optimizer.state.get(parameter, {}).items():
                    states[f"optimizer.{names[parameter]}.{key}"] = _state(model, names[parameter], value)
        states[_GROUPS] = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    fresh, old = _beside(path, "new"), _beside(path, "old")
    if dist.get_rank() == 0:
        shutil.rmtree(fresh, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    write(states, checkpoint_id=fresh, no_dist=dist.get_world_size() == 1)
    if dist.get_rank() == 0:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def load(model: ParallelModel, path: Path, optimizer: torch.optim.Optimizer | None) -> int:
    """Read model, optimizer and step. Raises `UsageError` when there is no checkpoint, or it is another model's."""
    if not path.exists() and _beside(path, "old").exists():
        path = _beside(path, "old")  # a save was interrupted between its two renames
    if not (path / ".metadata").exists():
        raise UsageError(f"'{path}' holds no checkpoint.")
    metadata = FileSystemReader(path).read_metadata()
    states: dict[str, Any] = {_STEP: torch.tensor(0)}
    for name, tensor in model.module.state_dict().items():
        if name not in metadata.state_dict_metadata:
            raise UsageError(f"the checkpoint '{path}' has no '{name}'.", "It was saved from another model.")
        if not tensor.is_meta:
            states[name] = _pieces(model, name, tensor)
    if optimizer is not None:
        states |= _empty_states(model, optimizer, metadata)
    read(states, checkpoint_id=path, no_dist=dist.get_world_size() == 1)
    for group, saved in zip(optimizer.param_groups if optimizer else [], states.get(_GROUPS) or [], strict=False):
        group.update(saved)
    return int(states[_STEP])


def _empty_states(model: ParallelModel, optimizer: torch.optim.Optimizer, metadata: Metadata) -> dict[str, Any]:
    """Give the optimizer the states that the checkpoint has, to be filled. They need not exist before its first step."""
    groups = _empty_groups(metadata)
    found: dict[str, Any] = {_GROUPS: groups} if groups else {}
    names = _names(model)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"optimizer.{names[parameter]}."
            for key, saved in metadata.state_dict_metadata.items():
                if not key.startswith(prefix) or "." in key[len(prefix) :] or not isinstance(saved, TensorStorageMetadata):
                    continue
                like_parameter = saved.size == parameter.shape and len(saved.size) > 0
                value = torch.zeros_like(parameter) if like_parameter else torch.zeros(saved.size, dtype=saved.properties.dtype)
                optimizer.state[parameter][key[len(prefix) :]] = value
                found[key] = _state(model, names[parameter], value)
    return found


def _empty_groups(metadata: Metadata) -> list[dict[str, Any]]:
    """Places for what the checkpoint has of the optimizer's groups, learning rates and the like: each is an entry of its own."""
    groups: dict[int, dict[str, Any]] = {}
    for key, saved in metadata.state_dict_metadata.items():
        if key.startswith(f"{_GROUPS}."):
            number, name = key[len(_GROUPS) + 1 :].split(".", 1)
            place = torch.zeros(saved.size, dtype=saved.properties.dtype) if isinstance(saved, TensorStorageMetadata) else None
            groups.setdefault(int(number), {})[name] = place
    return [groups[number] for number in sorted(groups)]


def full(model: ParallelModel, name: str, tensor: torch.Tensor | None) -> torch.Tensor:
    """A whole parameter (or a state shaped like it) or buffer on the CPU of every rank; see `gathered`."""
    return gathered(model, {name: tensor})[name]


def gathered(model: ParallelModel, tensors: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Whole parameters (or states shaped like them) and buffers on the CPU of every rank.

    All ranks must call this, in a pipeline also those that have them on meta, or their gradients not at all (None). Small ones
    are summed together: a collective takes its time however little it sends.
    """
    likes = {name: model.module.get_parameter(name) if tensor is None else tensor for name, tensor in tensors.items()}
    found: dict[str, torch.Tensor] = {}
    for names in _together(model, likes):
        shapes = [likes[name].shape for name in names]
        whole = torch.zeros(sum(shape.numel() for shape in shapes), dtype=likes[names[0]].dtype, device=model._device)
        parts = whole.split([shape.numel() for shape in shapes])
        for name, shape, part in zip(names, shapes, parts, strict=True):
            _contribute(model, name, tensors[name], part.view(shape))
        _sum(model, whole, names[0] in model._shards)
        found |= {name: part.view(shape).to("cpu", copy=True) for name, shape, part in zip(names, shapes, parts, strict=True)}
    return {name: found[name] for name in tensors}


def _together(model: ParallelModel, tensors: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names of tensors that are summed over the same ranks, in one format, up to `TOGETHER` bytes of them."""
    kinds: dict[tuple[torch.dtype, bool], list[str]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault((tensor.dtype, name in model._shards), []).append(name)
    for names in kinds.values():
        group, size = names[:1], tensors[names[0]].nbytes
        for name in names[1:]:
            size += tensors[name].nbytes
            if size > TOGETHER:
                yield group
                group, size = [], tensors[name].nbytes
            group.append(name)
        yield group


def _contribute(model: ParallelModel, name: str, tensor: torch.Tensor | None, whole: torch.Tensor) -> None:
    """Write into `whole`, which is zero, what this rank adds: of equal copies only one may be summed."""
    if model._tied is not None and model._tied.owner(name) != model._tied.rank:
        return
    if isinstance(tensor, DTensor):
        shards, at = model._shards[name], model._at
        local = tensor.to_local().detach()
        if at.tp == 0 or shards.layout.sharded:
            for piece in shards.pieces(at):
                piece.of_full(whole).copy_(piece.of_local(local))
    elif tensor is not None:
        whole.copy_(tensor.detach())


def _sum(model: ParallelModel, whole: torch.Tensor, cut: bool) -> None:
    for axis in ("dp_shard", "cp", "tp") if cut else ():
        if getattr(model.plan.mesh, axis) > 1:
            dist.all_reduce(whole, group=model.mesh.get_group(axis))
    if model._tied is not None:
        dist.all_reduce(whole, group=model._tied.group)


def _pieces(model: ParallelModel, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    shards, at = model._shards[name], model._at
    return Pieces(tensor.to_local().detach(), shards.shape, list(shards.pieces(at)))


def _state(model: ParallelModel, name: str, value: Any) -> Any:
    """An optimizer state: cut as its parameter when it is shaped like it, else the same on every rank."""
    return _pieces(model, name, value) if isinstance(value, torch.Tensor) else value


def _names(model: ParallelModel) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in model.module.named_parameters()}


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")
