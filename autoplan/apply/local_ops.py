"""What to do where a model's function meets a DTensor and DTensor alone would fail or choose a dearer way.

`LocalOps` sees every torch function that the model calls. Plain tensors among DTensors (masks, positions, rotary tables)
become replicated ones. Attention, embedding, dropout, cross-entropy and packed projections run on local tensors. What
DTensor has no rule for runs on replicated tensors. Everything else goes to DTensor unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.overrides import TorchFunctionMode

from autoplan.apply import context_parallel, heads, packed, ring, two_axes
from autoplan.apply.cross_entropy import vocab_parallel_cross_entropy
from autoplan.apply.packed import whole
from autoplan.apply.randomness import own_randomness
from autoplan.apply.trees import tree_map_only

_active = threading.local()


@contextmanager
def local_ops(mesh: DeviceMesh | None) -> Iterator[None]:
    """Run a forward pass with `LocalOps`, once however often it is asked for (a recomputed block asks in the backward pass)."""
    if mesh is None or mesh.size() == 1 or getattr(_active, "on", False):
        yield
        return
    _active.on = True
    try:
        with LocalOps(mesh):
            yield
    finally:
        _active.on = False


class LocalOps(TorchFunctionMode):
    """See the module."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.context = context_parallel.is_context(mesh)
        self.ring = ring.HANDLERS if ring.is_used(mesh) else {}
        cp, self.tp = two_axes.axes(mesh) if two_axes.is_both(mesh) else (None, mesh)
        """Where tensors are that are not cut along the sequence, unless cp is the only axis."""
        self.of_cp = LocalOps(cp) if cp is not None else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _UNTOUCHED:
            return func(*args, **kwargs)
        tensors = list(_tensors((*args, *kwargs.values())))
        if not any(isinstance(tensor, DTensor) for tensor in tensors):
            return func(*args, **kwargs)
        if self.context:
            return self._along_sequence(func, args, kwargs)
        if any(map(two_axes.over_both, tensors)):
            return self._over_both(func, args, kwargs)
        return self._over_tp(func, args, kwargs)

    def _over_tp(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not None:
                return result
        tensors = list(_tensors((*args, *kwargs.values())))
        meets_packed = any(packed.packing(tensor) is not None for tensor in tensors)
        if meets_packed and not _writes(func) and not packed.is_left_to_dtensor(func, args, kwargs):
            args, kwargs = tree_map_only(DTensor, _unpacked, (args, kwargs))
        if not all(isinstance(tensor, DTensor) for tensor in tensors):
            args, kwargs = tree_map_only(torch.Tensor, self._wrapped, (args, kwargs))
        return self._by_dtensor(func, args, kwargs)

    def _along_sequence(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, self._wrapped, (args, kwargs))
        for handlers in (self.ring, context_parallel.HANDLERS, _HANDLERS):
            result = handlers[func](*args, **kwargs) if func in handlers else None
            if result is not None:
                return result
        return self._by_dtensor(func, args, kwargs)

    def _over_both(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.of_cp is not None and not _writes(func) and two_axes.are_numbers(_tensors((*args, *kwargs.values()))):
            args, kwargs = tree_map_only(DTensor, lambda tensor: two_axes.along(tensor, two_axes.CP), (args, kwargs))
            result = self.of_cp._along_sequence(func, args, kwargs)
            return tree_map_only(DTensor, lambda tensor: two_axes.both(tensor, two_axes.CP, self.mesh, Replicate()), result)
        if func in two_axes.HANDLERS:
            run = lambda *own, **named: self._over_tp(func, own, named)  # noqa: E731
            result = two_axes.HANDLERS[func](run, *args, **kwargs)
            if result is not None:
                return result
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: two_axes.lifted(tensor, self.mesh), (args, kwargs))
        if not _writes(func) and not packed.is_left_to_dtensor(func, args, kwargs):
            args, kwargs = tree_map_only(DTensor, two_axes.unpacked, (args, kwargs))
        return self._by_dtensor(func, args, kwargs)

    def _by_dtensor(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return self._replicated(func, args, kwargs, error)

    def _wrapped(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DTensor):
            return tensor
        if self.context and tensor.requires_grad:
            return context_parallel.whole_parameter(tensor, self.mesh)
        return DTensor.from_local(tensor, self.tp, [Replicate()], run_check=False)

    def _replicated(self, func: Callable[..., Any], args: Any, kwargs: Any, error: Exception) -> Any:
        """Run what DTensor can't on replicated tensors; an error that remains is the model's own."""
        if _writes(func) and isinstance(args[0], DTensor) and not all(each.is_replicate() for each in args[0].placements):
            raise error  # the replicated copy would be written, not the tensor
        over_both = any(map(two_axes.over_both, _tensors((*args, *kwargs.values()))))

        def local(tensor: DTensor) -> torch.Tensor:
            found = two_axes.whole(tensor) if over_both else whole(tensor)
            return found.to_local(grad_placements=found.placements)

        def wrapped(tensor: torch.Tensor) -> torch.Tensor:
            if not over_both:
                return self._wrapped(tensor)
            return DTensor.from_local(tensor, self.mesh, [Replicate(), Replicate()], run_check=False)

        try:
            args, kwargs = tree_map_only(DTensor, local, (args, kwargs))
            result = func(*args, **kwargs)
        except Exception:
            raise error from None
        return tree_map_only(torch.Tensor, wrapped, result)


_UNTOUCHED = {"__get__", "__set__", "__delete__", "register_hook", "backward", "requires_grad_", "detach_", "as_subclass"}
"""Attributes and bookkeeping: no computation."""


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _tensors(args: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Of every call: quicker than a pytree."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, tuple | list):
            yield from _tensors(arg)
        elif isinstance(arg, dict):
            yield from _tensors(arg.values())


def _unpacked(tensor: DTensor) -> torch.Tensor:
    return tensor if packed.packing(tensor) is None else packed.gathered(tensor)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    if packed.packing(weight) is not None:
        return packed.linear(x, weight, bias)  # type: ignore[arg-type]
    if not isinstance(weight, DTensor):
        return None
    if isinstance(x, DTensor) and weight.placements[0].is_replicate():
        return _rowwise(x, weight, bias)
    if (
        isinstance(x, DTensor)
        and weight.placements[0] == Shard(0)
        and isinstance(bias, DTensor)
        and bias.placements[0].is_replicate()
    ):
        return F.linear(x, weight, _share(bias))
    return None


def _share(bias: DTensor) -> DTensor:
    """This rank's part of a replicated bias; its gradient is Partial. (DTensor would gather it, in as many pieces as used.)"""
    mesh = bias.device_mesh
    part = bias.to_local(grad_placements=[Partial()]).chunk(mesh.size())[mesh.get_local_rank()]
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False)


def _rowwise(x: DTensor, weight: DTensor, bias: torch.Tensor | None) -> DTensor | None:
    """A replicated weight on a sequence-sharded input: local. (DTensor would flatten the rows first, and gather them for it.)"""
    placement = x.placements[0]
    if not isinstance(placement, Shard) or placement.dim in (0, x.ndim - 1) or packed.packing(x) is not None:
        return None
    local_weight = weight.to_local(grad_placements=[Partial()])
    local_bias = bias.to_local(grad_placements=[Partial()]) if isinstance(bias, DTensor) else bias
    y = F.linear(x.to_local(grad_placements=x.placements), local_weight, local_bias)
    return DTensor.from_local(y, x.device_mesh, [Shard(placement.dim)], run_check=False)


def _addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, **options: Any) -> Any:
    return packed.addmm(bias, x, weight) if packed.packing(weight) is not None and not options else None  # type: ignore[arg-type]


def _on_packed(rule: Callable[..., Any]) -> Callable[..., Any]:
    """`rule` for packed tensors; None (so that DTensor is asked) for others."""

    def handler(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return rule(tensor, *args, **kwargs) if packed.packing(tensor) is not None else None

    return handler


def _view(tensor: DTensor, *shape: Any, **kwargs: Any) -> Any:
    sizes = kwargs.get("shape", kwargs.get("size", shape[0] if len(shape) == 1 else shape))
    if isinstance(sizes, int):
        sizes = (sizes,)
    return packed.view(tensor, sizes) if all(isinstance(size, int) for size in sizes) else None


def _embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> DTensor | None:
    """A vocabulary spread over the ranks: each looks up what it has, the sum is the answer: a clean Partial."""
    if not isinstance(weight, DTensor) or weight.placements[0] != Shard(0) or max_norm is not None or scale_grad_by_freq:
        return None
    mesh, local_weight = weight.device_mesh, weight.to_local(grad_placements=weight.placements)
    rows, first = local_weight.shape[0], mesh.get_local_rank() * local_weight.shape[0]
    local = (whole(indices).to_local() if isinstance(indices, DTensor) else indices) - first
    elsewhere = (local < 0) | (local >= rows)
    padding = None
    if padding_idx is not None:
        padding = padding_idx % weight.shape[0] - first
        padding = padding if 0 <= padding < rows else None
    out = F.embedding(local.masked_fill(elsewhere, 0), local_weight, padding)
    return DTensor.from_local(out.masked_fill(elsewhere[..., None], 0.0), mesh, [Partial()], run_check=False)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Dropout: ranks agree on replicated tensors and draw their own for their shards. (DTensor draws in step on CUDA alone.)"""
    if not training or p == 0.0 or not isinstance(input, DTensor):
        return input
    if packed.packing(input) is not None:
        return None
    tensor = whole(input) if input.placements[0].is_partial() else input
    with own_randomness(tensor.device_mesh, tensor.placements[0].is_shard()):
        out = F.dropout(tensor.to_local(grad_placements=tensor.placements), p, True)
    return DTensor.from_local(
        out, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _picking(func: Callable[..., Any], position: int) -> Callable[..., Any]:
    """`func`, which picks along a dim that is its argument `position`, where every rank has that dim whole: each picks its own.

    (Of DTensor's own there is no backward pass in torch 2.10.)
    """

    def handler(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        dim = kwargs.get("dim", args[position] if len(args) > position else -1)
        if not isinstance(tensor, DTensor) or tensor.placements[0].is_partial():
            return None
        if getattr(tensor.placements[0], "dim", None) == dim % tensor.ndim:
            return None

        def wrapped(part: torch.Tensor) -> DTensor:
            shape = (*tensor.shape[: dim % tensor.ndim], part.shape[dim], *tensor.shape[dim % tensor.ndim + 1 :])
            stride = torch.empty(shape, device="meta").stride()
            return DTensor.from_local(
                part, tensor.device_mesh, tensor.placements, run_check=False, shape=torch.Size(shape), stride=stride
            )

        return tree_map_only(torch.Tensor, wrapped, func(tensor.to_local(grad_placements=tensor.placements), *args, **kwargs))

    return handler


def _cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Vocabulary-parallel where the classes are sharded and the targets are indices; on replicated logits otherwise."""
    if not isinstance(input, DTensor):
        return None
    if isinstance(target, DTensor):
        target = whole(target).to_local()
    simple = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    if simple and input.ndim == 2 and input.placements[0] == Shard(1) and not target.is_floating_point():
        return vocab_parallel_cross_entropy(input, target, ignore_index, reduction)
    if isinstance(weight, DTensor):
        weight = whole(weight).to_local()
    logits = whole(input).to_local(grad_placements=[Replicate()])
    loss = F.cross_entropy(logits, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    return DTensor.from_local(loss, input.device_mesh, [Replicate()], run_check=False)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.scaled_dot_product_attention: heads.attention,
    F.dropout: _dropout,
    F.cross_entropy: _cross_entropy,
    torch.topk: _picking(torch.topk, 1),
    torch.Tensor.topk: _picking(torch.topk, 1),
    torch.sort: _picking(torch.sort, 0),
    torch.Tensor.sort: _picking(torch.sort, 0),
    torch.split: _on_packed(packed.split),
    torch.Tensor.split: _on_packed(packed.split),
    torch.chunk: _on_packed(packed.chunk),
    torch.Tensor.chunk: _on_packed(packed.chunk),
    torch.unflatten: _on_packed(packed.unflatten),
    torch.Tensor.unflatten: _on_packed(packed.unflatten),
    torch.Tensor.view: _on_packed(_view),
    torch.reshape: _on_packed(_view),
    torch.Tensor.reshape: _on_packed(_view),
    torch.Tensor.__getitem__: _on_packed(packed.getitem),
}
