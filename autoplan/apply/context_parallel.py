"""The cp axis: activations are cut along the sequence, parameters are whole, attention exchanges the sequence for heads.

Every rank of a cp group is given the same samples and keeps its part of the sequence of each (`cut_inputs`): a DTensor
`Shard(dim)`, so that the model still sees the whole length, and positions, masks and rotary tables that it makes for it are
right without its knowing. Around an attention kernel

    [batch, heads, seq / cp, head_dim]  <-- all_to_all -->  [batch, heads / cp, seq, head_dim]

(`attention`; DeepSpeed-Ulysses, arXiv:2309.14509): each rank runs the model's own kernel on the whole sequence of its heads,
so that causality needs no balancing. Heads of keys that are fewer than ranks are sent to several. What a rank's tokens say of
a parameter's gradient is a part of a sum over cp, which FSDP takes together with the mean over dp_shard (`_Whole`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from autoplan.apply._torch import StridedShard, all_to_all
from autoplan.apply.randomness import own_randomness
from autoplan.errors import UsageError
from autoplan.strategy import key_copies


def is_context(mesh: DeviceMesh) -> bool:
    """Whether tensors are spread over the cp axis alone, not over tp."""
    return mesh.mesh_dim_names == ("cp",)


def _cp(mesh: DeviceMesh) -> DeviceMesh:
    """The cp axis, where tp may be another (`two_axes`)."""
    return mesh if mesh.ndim == 1 else mesh["cp"]


def _spread(mesh: DeviceMesh, placement: Placement) -> list[Placement]:
    """`placement` over cp; whole over any other axis."""
    return [placement, *[Replicate()] * (mesh.ndim - 1)]


def cut_inputs(model: nn.Module, dims: dict[str, int], mesh: DeviceMesh) -> None:
    """Have `model.forward` see its inputs named in `dims` cut along those dims. A name is as the graph's: "ids", "batch.ids",
    or several joined by "," when one tensor is passed several times."""
    forward = model.forward
    names = list(inspect.signature(forward).parameters)
    places = [(place.split("."), dim) for leaf, dim in dims.items() for place in leaf.split(",")]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        for (first, *rest), dim in places:
            for found in (given, kwargs):
                if first in found:
                    found[first] = _cut(found[first], rest, dim, first, mesh)
        return forward(*given.values(), *args[len(given) :], **kwargs)

    model.forward = wrapped


def _cut(value: Any, path: list[str], dim: int, name: str, mesh: DeviceMesh) -> Any:
    """`value` with the tensor at `path` in it cut; the caller's containers stay as they are."""
    if path:
        key, *rest = path
        if isinstance(value, dict):
            return {**value, key: _cut(value[key], rest, dim, f"{name}.{key}", mesh)} if key in value else value
        if isinstance(value, tuple | list):
            items = [_cut(item, rest, dim, f"{name}.{key}", mesh) if str(i) == key else item for i, item in enumerate(value)]
            return type(value)(items)
        raise UsageError(f"input '{name}' is a {type(value).__name__}, in which '{key}' can't be cut.", "Pass tensors or dicts.")
    if not isinstance(value, torch.Tensor) or isinstance(value, DTensor):
        return value
    cp = _cp(mesh)
    if value.ndim <= dim or value.shape[dim] % cp.size():
        raise UsageError(
            f"input '{name}' {list(value.shape)} can't be cut into {cp.size()} equal parts along dim {dim}.",
            f"Give sequences whose length divides by cp {cp.size()}.",
        )
    part = value.chunk(cp.size(), dim)[cp.get_local_rank()].contiguous()
    return DTensor.from_local(part, mesh, _spread(mesh, Shard(dim)), run_check=False)


def whole_parameter(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """A parameter, or something made of parameters alone, as a DTensor."""
    found: torch.Tensor = _Whole.apply(tensor, mesh)
    return found


class _Whole(torch.autograd.Function):
    """Replicate; each rank keeps its own gradient. FSDP will take the mean over dp_shard x cp: over cp a sum is wanted."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, mesh: DeviceMesh) -> DTensor:
        if not isinstance(tensor, DTensor):
            ctx.tp = None
            return DTensor.from_local(tensor.view_as(tensor), mesh, _spread(mesh, Replicate()), run_check=False)
        ctx.tp, ctx.shape, ctx.stride = tensor.device_mesh, tensor.shape, tensor.stride()
        placements = [Replicate(), tensor.placements[0]]
        return DTensor.from_local(
            tensor.to_local(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> tuple[torch.Tensor, None]:
        over_cp = gradient.placements[0]
        wanted = [over_cp if over_cp.is_partial() else Replicate()]
        wanted += [placement if ctx.tp is not None else Replicate() for placement in gradient.placements[1:]]
        local = gradient.redistribute(placements=wanted).to_local()
        local = local * gradient.device_mesh.size(0) if over_cp.is_partial() else local
        if ctx.tp is None:
            return local, None
        return DTensor.from_local(local, ctx.tp, wanted[1:], run_check=False, shape=ctx.shape, stride=ctx.stride), None


def rows(x: torch.Tensor) -> Placement | None:
    """The placement of a tensor that is cut along a dim other than its last, else None."""
    if not isinstance(x, DTensor):
        return None
    placement = x.placements[0]
    cut = isinstance(placement, Shard | StridedShard) and placement.dim < x.ndim - 1
    return placement if cut else None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> DTensor | None:
    """Each rank's rows. (DTensor would flatten them first, and gather them for it.)"""
    placement = rows(x)
    if placement is None or not isinstance(x, DTensor):
        return None
    y = F.linear(_rows(x), _sum_of_gradients(weight), None if bias is None else _sum_of_gradients(bias))
    return _like(y, x, (*x.shape[:-1], y.shape[-1]))


def _rows(x: DTensor) -> torch.Tensor:
    return x.to_local(grad_placements=x.placements)


def _sum_of_gradients(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local(grad_placements=[Partial()]) if isinstance(parameter, DTensor) else parameter


def _like(local: torch.Tensor, x: DTensor, shape: tuple[int, ...]) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, x.device_mesh, x.placements, run_check=False, shape=torch.Size(shape), stride=stride)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> DTensor | None:
    """Attention of the whole sequence for a share of the heads; None where these are not cut along the sequence."""
    tensors = (query, key, value)
    if not all(isinstance(t, DTensor) and t.ndim == 4 and t.placements[0] == Shard(2) for t in tensors):
        return None
    mesh: DeviceMesh = query.device_mesh  # type: ignore[attr-defined]
    heads, key_heads, cp = query.shape[1], key.shape[1], mesh.size()
    copies = key_copies(key_heads, cp)
    if heads % cp or key_heads * copies % cp:
        raise UsageError(
            f"attention with {heads} heads of queries and {key_heads} of keys can't be spread over cp {cp}.",
            "Plan again, or fix cp to less.",
        )
    mask = attn_mask
    if isinstance(mask, DTensor):
        mask = mask.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
        mask = mask.chunk(mesh.size(), 1)[mesh.get_local_rank()]
    q, k, v = (_rows(tensor) for tensor in tensors)  # type: ignore[arg-type]
    if copies > 1:
        k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
    q, k, v = (_exchange(tensor, 1, 2, mesh) for tensor in (q, k, v))
    with own_randomness(mesh, dropout_p > 0):
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return DTensor.from_local(_exchange(out, 2, 1, mesh), mesh, [Shard(2)], run_check=False)


def _exchange(local: torch.Tensor, cut: int, joined: int, mesh: DeviceMesh) -> torch.Tensor:
    found: torch.Tensor = _AllToAll.apply(local, cut, joined, mesh)
    return found


class _AllToAll(torch.autograd.Function):
    """Cut along one dim, join along another; backward the other way round."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, cut: int, joined: int, mesh: DeviceMesh) -> torch.Tensor:
        ctx.dims, ctx.mesh = (joined, cut), mesh
        return _all_to_all(local, cut, joined, mesh)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cut, joined = ctx.dims
        return _all_to_all(gradient, cut, joined, ctx.mesh), None, None, None


def _all_to_all(local: torch.Tensor, cut: int, joined: int, mesh: DeviceMesh) -> torch.Tensor:
    sent = local.unflatten(cut, (mesh.size(), -1)).movedim(cut, 0).contiguous()
    received = all_to_all(sent, None, None, mesh.get_group())
    return received.movedim(0, joined).flatten(joined, joined + 1)


def regroup(x: torch.Tensor, shape: tuple[int, ...]) -> DTensor | None:
    """`[batch, seq, ...]` as `[batch * seq, ...]` or the other way, every rank its own rows; None for any other view of `x`."""
    if not isinstance(x, DTensor):
        return None
    rest = x.numel() // max(prod(size for size in shape if size != -1), 1)
    placement, sizes = x.placements[0], [rest if size == -1 else size for size in shape]
    if sizes == list(x.shape):
        return _View.apply(x, x.placements, torch.Size(sizes)) if _joined(placement, x) else None
    moved = -1
    if placement == Shard(1) and x.ndim > 1 and sizes == [x.shape[0] * x.shape[1], *x.shape[2:]]:
        into: Placement = Shard(0) if x.shape[0] == 1 else StridedShard(0, split_factor=x.shape[0])
    elif (batch := _joined(placement, x)) and sizes == [batch, x.shape[0] // batch, *x.shape[1:]]:
        into, moved = Shard(1), 1
    else:
        return None
    others = [_moved(other, moved) for other in x.placements[1:]]
    if None in others:
        return None
    found: DTensor = _View.apply(x, (into, *others), torch.Size(sizes))
    return found


def _moved(placement: Placement, by: int) -> Placement | None:
    """A placement over tp of a tensor whose first two dims become one, or the other way; None where it cuts these."""
    if isinstance(placement, StridedShard):
        return StridedShard(placement.dim + by, split_factor=placement.split_factor) if placement.dim > (by < 0) else None
    if isinstance(placement, Shard):
        return Shard(placement.dim + by) if placement.dim > (by < 0) else None
    return placement


def _joined(placement: Placement, x: DTensor) -> int:
    """How many samples' positions the first dim of `x` runs over, cut in each; 0 where it isn't cut that way."""
    if isinstance(placement, StridedShard) and placement.dim == 0:
        return int(placement.split_factor)
    return int(placement == Shard(0) and x.ndim > 1)


class _View(torch.autograd.Function):
    """A rank's rows seen as a part of `shape`. (DTensor of torch 2.10 can't view rows that are cut in strides.)"""

    @staticmethod
    def forward(ctx: Any, x: DTensor, into: tuple[Placement, ...], shape: torch.Size) -> DTensor:
        ctx.placements, ctx.shape, ctx.stride, ctx.into = x.placements, x.shape, x.stride(), into
        local, mesh = x.to_local(), x.device_mesh
        ctx.local, part = local.shape, list(shape)
        for axis, placement in enumerate(into):
            if isinstance(placement, Shard | StridedShard):
                part[placement.dim] //= mesh.size(axis)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local.reshape(part), mesh, ctx.into, run_check=False, shape=shape, stride=stride)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> tuple[DTensor, None, None]:
        if gradient.placements != ctx.into:
            gradient = gradient.redistribute(placements=ctx.into)
        local = gradient.to_local().reshape(ctx.local)
        mesh = gradient.device_mesh
        return DTensor.from_local(local, mesh, ctx.placements, run_check=False, shape=ctx.shape, stride=ctx.stride), None, None


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    of_rows: Callable[..., torch.Tensor] = lambda rows, *args, **options: F.cross_entropy(_rows(rows), *args, **options),
) -> DTensor | None:
    """The loss of each rank's rows, added up; None where the rows are not cut, or there is more to it. `of_rows` is the loss of
    a rank's own."""
    placement = rows(input)
    plain = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum")
    if placement is None or placement.dim or input.ndim != 2 or not plain or target.is_floating_point():  # type: ignore[attr-defined]
        return None
    assert isinstance(input, DTensor)
    mesh = input.device_mesh
    local_target = _target(target, placement, _cp(mesh))
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": "sum", "label_smoothing": label_smoothing}
    total = of_rows(input, local_target, **options)
    if reduction == "mean":
        count = (local_target != ignore_index).sum()
        if not count.is_meta:  # else shapes alone are asked for, and torch 2.10 has none of an all_reduce
            dist.all_reduce(count, group=_cp(mesh).get_group())
        total = total / count
    part = DTensor.from_local(total, mesh, _spread(mesh, Partial()), run_check=False)
    return part.redistribute(placements=_spread(mesh, Replicate()))


def _target(target: torch.Tensor, placement: Placement, mesh: DeviceMesh) -> torch.Tensor:
    """The labels of this rank's rows."""
    if isinstance(target, DTensor):
        if target.placements[0] == placement:
            return target.to_local()
        target = target.redistribute(placements=[Replicate()]).to_local()
    batch = int(placement.split_factor) if isinstance(placement, StridedShard) else 1
    return target.view(batch, -1).chunk(mesh.size(), 1)[mesh.get_local_rank()].reshape(-1)


def _viewed(x: torch.Tensor, *shape: Any, **kwargs: Any) -> DTensor | None:
    sizes = kwargs.get("shape", kwargs.get("size", shape[0] if len(shape) == 1 else shape))
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes) if isinstance(sizes, tuple | list) else ()
    return regroup(x, sizes) if all(isinstance(size, int) for size in sizes) else None


def _flattened(x: torch.Tensor, start_dim: int = 0, end_dim: int = -1) -> DTensor | None:
    first, last = start_dim % max(x.ndim, 1), end_dim % max(x.ndim, 1)
    return regroup(x, (-1, *x.shape[2:])) if (first, last) == (0, 1) else None


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    F.scaled_dot_product_attention: attention,
    F.cross_entropy: cross_entropy,
    torch.Tensor.view: _viewed,
    torch.Tensor.view_as: lambda x, other: regroup(x, tuple(other.shape)),
    torch.Tensor.reshape: _viewed,
    torch.reshape: _viewed,
    torch.Tensor.flatten: _flattened,
    torch.flatten: _flattened,
}
"""What differs from `local_ops` where tensors are cut along the sequence."""
