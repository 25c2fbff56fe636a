"""cp and tp together: what is cut along the sequence is a DTensor over the mesh (cp, tp), all else stays over tp.

A function meets such a tensor in one of three ways:

    it knows nothing of positions (linear, norm,    it runs over tp, on this rank's part of the sequence, as if
    embedding, dropout, what is packed)             there were no other part (`_over_tp`)
    it is attention or the loss                     over tp its heads or classes are spread, over cp its positions:
                                                    each axis by its own rules
    any other                                       by DTensor, over both

For that a tensor is seen as one over one axis alone (`along`) and the result as one over both again (`both`). Parameters, which
are over tp, are multiplied with this rank's part of the tokens, so that their gradients are parts of a sum, of which FSDP will
take a mean (`_OfAll`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from autoplan.apply import context_parallel, packed
from autoplan.apply._torch import StridedShard
from autoplan.apply.heads import local_mask
from autoplan.apply.randomness import own_randomness
from autoplan.apply.trees import tree_leaves, tree_map_only

CP, TP = 0, 1
"""Where the axes are in the mesh of both."""

Run = Callable[..., Any]
"""The function over tp, as `local_ops` runs it there."""


def is_both(mesh: DeviceMesh) -> bool:
    """Whether tensors are spread over cp and tp."""
    return mesh.mesh_dim_names == ("cp", "tp")


def over_both(tensor: Any) -> bool:
    """Whether a tensor is spread over cp and tp."""
    return isinstance(tensor, DTensor) and is_both(tensor.device_mesh)


def axes(mesh: DeviceMesh) -> tuple[DeviceMesh, DeviceMesh]:
    """The cp axis and the tp axis of the mesh of both, made once. (Not by a cache: an equal mesh may have other groups.)"""
    known = vars(mesh)
    if "autoplan_axes" not in known:
        known["autoplan_axes"] = mesh["cp"], mesh["tp"]
    found: tuple[DeviceMesh, DeviceMesh] = known["autoplan_axes"]
    return found


def along(tensor: DTensor, axis: int, gradient: Placement | None = None) -> DTensor:
    """`tensor` as one over `axis` alone, of which the other axis knows nothing; `gradient` is the placement over the other axis
    of the gradient that comes back, where it isn't the tensor's own."""
    other = tensor.placements[1 - axis]
    found: DTensor = _Along.apply(tensor, axis, gradient or (Replicate() if other.is_partial() else other))
    return found


def both(tensor: DTensor, axis: int, mesh: DeviceMesh, other: Placement) -> DTensor:
    """A tensor over `axis` as one over both, of which the other axis has what `other` says."""
    found: DTensor = _Both.apply(tensor, axis, mesh, other)
    return found


class _Along(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor, axis: int, gradient: Placement) -> DTensor:
        ctx.like = axis, tensor.device_mesh, gradient
        return _wrapped(tensor.to_local(), axes(tensor.device_mesh)[axis], [tensor.placements[axis]])

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> tuple[DTensor, None, None]:
        axis, mesh, other = ctx.like
        return _wrapped(gradient.to_local(), mesh, _ordered(axis, gradient.placements[0], other)), None, None


class _Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor, axis: int, mesh: DeviceMesh, other: Placement) -> DTensor:
        ctx.axis, ctx.other = axis, Replicate() if other.is_partial() else other
        return _wrapped(tensor.to_local(), mesh, _ordered(axis, tensor.placements[0], other))

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> tuple[DTensor, None, None, None]:
        mine = gradient.placements[ctx.axis]
        if gradient.placements[1 - ctx.axis] != ctx.other:
            gradient = gradient.redistribute(placements=_ordered(ctx.axis, mine, ctx.other))
        return _wrapped(gradient.to_local(), axes(gradient.device_mesh)[ctx.axis], [mine]), None, None, None


class _OfAll(torch.autograd.Function):
    """What is over tp alone, of whose gradient each rank of cp will have a part: FSDP takes a mean where a sum is meant."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, cp: int) -> torch.Tensor:
        ctx.cp = cp
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.cp, None


def _ordered(axis: int, mine: Placement, other: Placement) -> list[Placement]:
    return [mine, other] if axis == CP else [other, mine]


def _wrapped(local: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    shape, stride = list(local.shape), list(local.stride())
    for size, placement in zip(mesh.shape, placements, strict=True):
        if isinstance(placement, Shard | StridedShard):
            shape[placement.dim] *= size
            outside = stride[placement.dim]
            stride = [step * size if dim != placement.dim and step >= outside else step for dim, step in enumerate(stride)]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride))


def on_one_axis(tensor: DTensor, axis: int, change: Callable[[DTensor], DTensor]) -> DTensor:
    """`tensor` changed over one axis; over the other it stays as it is."""
    return both(change(along(tensor, axis)), axis, tensor.device_mesh, tensor.placements[1 - axis])


def whole(tensor: DTensor) -> DTensor:
    """`tensor` replicated over both."""
    for axis in (TP, CP):
        if not tensor.placements[axis].is_replicate():
            tensor = on_one_axis(tensor, axis, packed.whole)
    return tensor


def unpacked(tensor: DTensor) -> DTensor:
    """`tensor`, over tp replicated where it was packed there."""
    return on_one_axis(tensor, TP, packed.whole) if packed.packing(tensor) is not None else tensor


def are_numbers(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether these are numbers of tokens, masks and the like, which every rank of tp has: then cp alone counts. (DTensor would
    bring them together over tp too, where it finds that as good.)"""

    def is_one(tensor: torch.Tensor) -> bool:
        whole_over_tp = not isinstance(tensor, DTensor) or (over_both(tensor) and tensor.placements[TP].is_replicate())
        return whole_over_tp and not tensor.requires_grad

    return all(map(is_one, tensors))


def lifted(tensor: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """Any tensor as one over both."""
    if isinstance(tensor, DTensor) and is_both(tensor.device_mesh):
        return tensor
    if tensor.requires_grad:
        return context_parallel.whole_parameter(tensor, mesh)  # type: ignore[return-value]
    if isinstance(tensor, DTensor):
        return both(tensor, TP, mesh, Replicate())
    return DTensor.from_local(tensor, mesh, [Replicate(), Replicate()], run_check=False)


def _over_tp(run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`run` over tp, on this rank's part of the sequence; None where the tensors are not all cut in one way."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if over_both(leaf)]
    mesh, cuts = given[0].device_mesh, {tensor.placements[CP] for tensor in given}
    cut = next(iter(cuts))
    if len(cuts) != 1 or not isinstance(cut, Shard | StridedShard):
        return None

    def part(tensor: torch.Tensor) -> torch.Tensor:
        if over_both(tensor):
            return along(tensor, TP)  # type: ignore[arg-type]
        return _OfAll.apply(tensor, mesh.size(CP)) if tensor.requires_grad else tensor

    args, kwargs = tree_map_only(torch.Tensor, part, (args, kwargs))
    return tree_map_only(DTensor, lambda tensor: both(tensor, TP, mesh, cut), run(*args, **kwargs))


def _cut_dim(tensor: Any) -> int | None:
    """The dim that is cut along the sequence."""
    return getattr(tensor.placements[CP], "dim", None) if over_both(tensor) else None


def _blind(run: Run, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that takes every row of its first argument by itself."""
    dim = _cut_dim(x)
    return _over_tp(run, (x, *args), kwargs) if dim is not None and dim < x.ndim - 1 else None


def _addmm(run: Run, bias: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return _over_tp(run, (bias, x, *args), kwargs) if _cut_dim(x) == 0 and not over_both(bias) else None


def _embedding(run: Run, indices: Any, *args: Any, **kwargs: Any) -> Any:
    return _over_tp(run, (indices, *args), kwargs) if _cut_dim(indices) is not None else None


def _norm(run: Run, x: Any, normalized_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    dim = _cut_dim(x)
    return (
        _over_tp(run, (x, normalized_shape, *args), kwargs) if dim is not None and dim < x.ndim - len(normalized_shape) else None
    )


def _dropout(run: Run, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or p == 0.0:
        return x
    if _cut_dim(x) is None:
        return None
    with own_randomness(axes(x.device_mesh)[CP], True):
        return _over_tp(run, (x, p, training), {})


def _picking(position: int) -> Callable[..., Any]:
    """A function that picks along the dim that is its argument `position`."""

    def handler(run: Run, x: Any, *args: Any, **kwargs: Any) -> Any:
        dim = kwargs.get("dim", args[position] if len(args) > position else -1)
        cut = _cut_dim(x)
        return _over_tp(run, (x, *args), kwargs) if cut is not None and cut != dim % x.ndim else None

    return handler


def _on_packed(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule of packed tensors, which takes them apart along their packed dim."""

    def handler(run: Run, x: Any, *args: Any, **kwargs: Any) -> Any:
        return _over_tp(rule, (x, *args), kwargs) if over_both(x) and packed.packing(x) is not None else None

    return handler


def _viewed(run: Run, x: Any, *shape: Any, **kwargs: Any) -> Any:
    sizes = kwargs.get("shape", kwargs.get("size", shape[0] if len(shape) == 1 else shape))
    sizes = [sizes] if isinstance(sizes, int) else list(sizes) if isinstance(sizes, tuple | list) else []
    if not over_both(x) or not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    if -1 in sizes:
        sizes[sizes.index(-1)] = x.numel() // max(-prod(sizes), 1)
    found = context_parallel.regroup(x, tuple(sizes))
    if found is not None:
        return found
    cut = x.placements[CP]
    if not isinstance(cut, Shard) or sizes[: cut.dim + 1] != list(x.shape[: cut.dim + 1]):
        return None
    sizes[cut.dim] //= x.device_mesh.size(CP)
    return _over_tp(lambda part: run(part, tuple(sizes)), (x,), {})


def _flattened(run: Run, x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    first, last = start_dim % max(x.ndim, 1), end_dim % max(x.ndim, 1)
    return context_parallel.regroup(x, (-1, *x.shape[2:])) if over_both(x) and (first, last) == (0, 1) else None


def _attention(
    run: Run,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention by heads over tp and then by what else cp exchanges."""
    tensors = [query, key, value]
    if not all(over_both(tensor) and tensor.ndim == 4 and tensor.placements[CP] == Shard(2) for tensor in tensors):
        return None
    mesh = query.device_mesh
    cp, tp = axes(mesh)
    by_heads = all(tensor.placements[TP] == Shard(1) for tensor in tensors)
    if not by_heads:
        tensors = [on_one_axis(tensor, TP, packed.whole) for tensor in tensors]
    mask = attn_mask
    if mask is not None:
        mask = along(whole(mask), TP, Partial()) if over_both(mask) else _OfAll.apply(mask, cp.size())
        if by_heads:
            mask = local_mask(mask, query.shape[1], tp)
        elif isinstance(mask, DTensor):
            mask = packed.whole(mask).to_local(grad_placements=[Replicate()])
    with own_randomness(tp, by_heads and dropout_p > 0):
        q, k, v = (along(tensor, CP) for tensor in tensors)
        out = context_parallel.attention(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa)
    assert out is not None
    return both(out, CP, mesh, Shard(1) if by_heads else Replicate())


def _cross_entropy(run: Run, input: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    """The loss of this rank's rows over tp, added up over cp."""

    def of_rows(rows: DTensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        loss: torch.Tensor = run(along(rows, TP), labels, **options).to_local(grad_placements=[Replicate()])
        return loss

    if not over_both(input):
        return None
    if isinstance(target, DTensor):
        target = whole(target) if over_both(target) and target.placements[CP] != input.placements[CP] else target
        target = along(target, CP) if over_both(target) else target.to_local()
    return context_parallel.cross_entropy(input, target, *args, **kwargs, of_rows=of_rows)


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _blind,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _norm,
    F.rms_norm: _norm,
    F.dropout: _dropout,
    F.scaled_dot_product_attention: _attention,
    F.cross_entropy: _cross_entropy,
    torch.topk: _picking(1),
    torch.Tensor.topk: _picking(1),
    torch.sort: _picking(0),
    torch.Tensor.sort: _picking(0),
    torch.split: _on_packed(packed.split),
    torch.Tensor.split: _on_packed(packed.split),
    torch.chunk: _on_packed(packed.chunk),
    torch.Tensor.chunk: _on_packed(packed.chunk),
    torch.unflatten: _on_packed(packed.unflatten),
    torch.Tensor.unflatten: _on_packed(packed.unflatten),
    torch.Tensor.__getitem__: _on_packed(packed.getitem),
    torch.Tensor.view: _viewed,
    torch.Tensor.view_as: lambda run, x, other: context_parallel.regroup(x, tuple(other.shape)) if over_both(x) else None,
    torch.reshape: _viewed,
    torch.Tensor.reshape: _viewed,
    torch.flatten: _flattened,
    torch.Tensor.flatten: _flattened,
}
"""What differs from DTensor where tensors are over both; each is given the function over tp first."""
