"""Packed tensors: `k` equal parts (q, k and v) along one dim, every rank of the tp axis holding its share of each part.

DTensor calls that placement a strided shard and can gather it, but not compute with it. What a Transformer does with
one is little: a linear makes it, and a split, a view or an index takes its parts apart. Those run here, on local tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from autoplan.apply._torch import StridedShard
from autoplan.apply.trees import tree_leaves


def packing(tensor: Any) -> tuple[int, int] | None:
    """(dim, number of parts) of a packed tensor, None of any other."""
    if type(tensor) is not DTensor and not isinstance(tensor, DTensor):
        return None
    mesh, placement = tensor.device_mesh, tensor.placements[-1]
    if not isinstance(placement, StridedShard) or (mesh.ndim != 1 and mesh.mesh_dim_names != ("cp", "tp")):
        return None
    return placement.dim, int(placement.split_factor)


def to_parts(tensor: DTensor) -> list[DTensor]:
    """The parts, each an ordinary sharded tensor."""
    dim, blocks = _packing(tensor)
    return [_wrap(part, tensor, Shard(dim)) for part in _local(tensor).chunk(blocks, dim)]


def gathered(tensor: DTensor) -> torch.Tensor:
    """The tensor replicated: what any operation that is not known here gets."""
    dim, _ = _packing(tensor)
    return torch.cat([part.redistribute(placements=[Replicate()]) for part in to_parts(tensor)], dim)


def whole(tensor: DTensor) -> DTensor:
    """`tensor` replicated."""
    if packing(tensor) is not None:
        return gathered(tensor)  # type: ignore[return-value]
    return tensor if tensor.placements[0].is_replicate() else tensor.redistribute(placements=[Replicate()])


def linear(x: DTensor, weight: DTensor, bias: torch.Tensor | None = None) -> DTensor:
    """`F.linear` with a weight packed along its rows: the output is packed along its last dim."""
    _, blocks = _packing(weight)
    local_bias = None if bias is None else _share(bias, weight, blocks)
    y = F.linear(_whole(x), _local(weight), local_bias)
    return _wrap(y, weight, StridedShard(y.ndim - 1, split_factor=blocks))


def addmm(bias: torch.Tensor, x: DTensor, weight: DTensor) -> DTensor:
    """`torch.addmm` with a weight packed along its columns (Hugging Face's Conv1D)."""
    _, blocks = _packing(weight)
    y = torch.addmm(_share(bias, weight, blocks), _whole(x), _local(weight))
    return _wrap(y, weight, StridedShard(1, split_factor=blocks))


def split(tensor: DTensor, size: int | Sequence[int], dim: int = 0) -> tuple[torch.Tensor, ...] | None:
    """The parts when the split takes exactly them apart, else None."""
    packed, blocks = _packing(tensor)
    part = tensor.shape[packed] // blocks
    sizes = [size] * -(-tensor.shape[packed] // size) if isinstance(size, int) else list(size)
    if dim % tensor.ndim != packed or sizes != [part] * blocks:
        return None
    return tuple(to_parts(tensor))


def chunk(tensor: DTensor, chunks: int, dim: int = 0) -> tuple[torch.Tensor, ...] | None:
    """The parts when there are as many chunks, else None."""
    packed, blocks = _packing(tensor)
    return tuple(to_parts(tensor)) if dim % tensor.ndim == packed and chunks == blocks else None


def view(tensor: DTensor, shape: Sequence[int]) -> torch.Tensor | None:
    """A view that keeps the packed dim whole, or separates its parts: `[b, t, k * h * d]` as `[b, t, k, h, d]`."""
    packed, blocks = _packing(tensor)
    size, mesh = tensor.shape[packed], tensor.device_mesh.size()
    if packed != tensor.ndim - 1:
        return None
    new = list(shape)
    if -1 in new:
        new[new.index(-1)] = tensor.numel() // -prod(new)
    lead = prod(tensor.shape[:packed])
    for dim in range(len(new)):
        if prod(new[:dim]) != lead:
            continue
        local = list(new)
        if new[dim:] == [size]:
            local[dim] = size // mesh
            return _wrap(_local(tensor).reshape(local), tensor, StridedShard(dim, split_factor=blocks))
        if new[dim] == blocks and len(new) > dim + 1 and new[dim + 1] % mesh == 0:
            local[dim + 1] //= mesh
            return _wrap(_local(tensor).reshape(local), tensor, Shard(dim + 1))
    return None


def unflatten(tensor: DTensor, dim: int, sizes: Sequence[int]) -> torch.Tensor | None:
    """As `view`, said by the packed dim alone."""
    packed, _ = _packing(tensor)
    return view(tensor, [*tensor.shape[:packed], *sizes]) if dim % tensor.ndim == packed == tensor.ndim - 1 else None


def getitem(tensor: DTensor, index: Any) -> torch.Tensor | None:
    """One part, when the index is a slice of exactly that along the packed dim: `x[..., :c]`."""
    packed, blocks = _packing(tensor)
    entries = index if isinstance(index, tuple) else (index,)
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries = (*entries[:at], *[slice(None)] * (tensor.ndim - len(entries) + 1), *entries[at + 1 :])
    if len(entries) <= packed or any(not isinstance(entry, slice) for entry in entries):
        return None
    if any(entry != slice(None) for dim, entry in enumerate(entries) if dim != packed):
        return None
    start, stop, step = entries[packed].indices(tensor.shape[packed])
    part = tensor.shape[packed] // blocks
    if step != 1 or stop - start != part or start % part:
        return None
    found: torch.Tensor = to_parts(tensor)[start // part]
    return found


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


_EACH = _words(
    "to float half bfloat16 double clone contiguous detach alias neg mul multiply add sub subtract div divide",
    "true_divide truediv rmul radd rsub pow square sqrt rsqrt exp tanh sigmoid relu gelu silu elu softplus erf abs clamp where",
)
"""Functions of each element."""
_MOVES = _words("transpose swapaxes swapdims permute movedim moveaxis t unsqueeze")
"""Functions that only reorder dims."""
_ASKS = _words(
    "size dim ndimension numel nelement element_size stride storage_offset is_contiguous is_floating_point is_complex is_signed",
    "get_device data_ptr untyped_storage type repr str format len hash retain_grad is_same_size",
)
"""Functions that compute nothing."""


def is_left_to_dtensor(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether DTensor is right about `func` with packed tensors. Of all else torch 2.10 returns wrong numbers, 2.13 of cumsum."""
    name = getattr(func, "__name__", "").strip("_")
    if name in _ASKS:
        return True
    given = tree_leaves((args, kwargs))
    packings = {packing(leaf) for leaf in given if isinstance(leaf, torch.Tensor) and leaf.ndim}
    return len(packings) == 1 and name in _EACH | _MOVES


def _packing(tensor: DTensor) -> tuple[int, int]:
    found = packing(tensor)
    assert found is not None
    return found


def _local(tensor: DTensor) -> torch.Tensor:
    return tensor.to_local(grad_placements=tensor.placements)


def _whole(x: torch.Tensor) -> torch.Tensor:
    """The input of a column-parallel linear: replicated, with a gradient that is Partial."""
    if not isinstance(x, DTensor):
        return x
    packed = packing(x)
    if packed is not None:
        x = cast(DTensor, gathered(x))
    elif not x.placements[0].is_replicate():
        x = x.redistribute(placements=[Replicate()])
    return x.to_local(grad_placements=[Partial()])


def _share(bias: torch.Tensor, weight: DTensor, blocks: int) -> torch.Tensor:
    """This rank's share of each part of a replicated bias; the gradient of the others is another rank's: Partial."""
    local = _whole(bias)
    mesh = weight.device_mesh
    parts = local.unflatten(0, (blocks, mesh.size(), -1))
    return cast(torch.Tensor, parts[:, mesh.get_local_rank()].reshape(-1))


def _wrap(local: torch.Tensor, like: DTensor, placement: Placement) -> DTensor:
    """A DTensor of which this rank holds `local`; the sharded dim is evenly cut."""
    mesh = like.device_mesh
    shape = list(local.shape)
    shape[placement.dim] *= mesh.size()  # type: ignore[attr-defined]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride)
