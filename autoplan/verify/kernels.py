"""Operations that keep on a CPU what they would keep on a GPU: a dry run measures memory as training will need it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from autoplan.apply.context_parallel import whole_parameter
from autoplan.capture.private import patched
from autoplan.capture.semantics import decisions


class _RMSNorm(torch.autograd.Function):
    """The fused kernel of GPUs keeps its input and a float32 number a row; CPUs take the norm apart and keep all between.

    The gradients have the right shapes and placements, no more: in a dry run tensors have no values.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = norm.square().div(x.shape[-1]).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        out: Tensor = x * scale.to(x.dtype)
        return out if weight is None else out * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        of_x = gradient * scale.to(gradient.dtype)
        return of_x, None if weight is None else (gradient * x).sum(tuple(range(x.ndim - 1))), None


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if len(shape) != 1:
        return _original(x, shape, weight, eps)
    if weight is not None and isinstance(x, DTensor) and getattr(weight, "device_mesh", None) != x.device_mesh:
        weight = whole_parameter(weight, x.device_mesh)
    normed: Tensor = _RMSNorm.apply(x, weight, 1e-6 if eps is None else eps)
    return normed


class _Attention(torch.autograd.Function):
    """The memory-efficient kernel of GPUs keeps what it is given, its result and a float32 number a row. Values are zeros."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_zeros((batch, length, heads, value.shape[-1])).transpose(1, 2)  # so that the heads lie together
        ctx.save_for_backward(query, key, value, mask, out, query.new_zeros(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors[:4]
        return tuple(torch.zeros_like(x) if wanted else None for x, wanted in zip(saved, ctx.needs_input_grad, strict=True))


def _scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *rest: Any, **options: Any
) -> Tensor:
    """CPUs have no kernel with dropout, nor for values of another width than queries have, as DeepSeek's: they write all scores
    to memory."""
    spread = [tensor for tensor in (query, key, value) if isinstance(tensor, DTensor)]
    placed = {tensor.placements for tensor in spread}
    alike = not spread or (len(spread) == 3 and placed in ({(Shard(1),)}, {(Replicate(),)}))
    if not alike or (query.shape[-1] == value.shape[-1] and not dropout_p):
        return _original_attention(query, key, value, attn_mask, dropout_p, *rest, **options)
    operands = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in (query, key, value, attn_mask)]
    found: Tensor = _Attention.apply(*operands)
    return DTensor.from_local(found, spread[0].device_mesh, spread[0].placements, run_check=False) if spread else found


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """The kernel of GPUs keeps a byte a number; CPUs keep a number of its own kind."""
    if isinstance(input, DTensor) or inplace or not training or not 0 < p < 1:
        return _original_dropout(input, p, training, inplace)  # a DTensor comes again as its local part
    return torch.native_dropout(input, p, True)[0]


_original = F.rms_norm
_original_dropout = F.dropout
_original_attention = F.scaled_dot_product_attention


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """While it lasts, `F.rms_norm`, `torch.nn.RMSNorm`, attention and dropout keep what they keep on a GPU, and transformers
    decides as it does on tensors with values (`capture.semantics.decisions`)."""
    with ExitStack() as stack:
        stack.enter_context(patched(F, "rms_norm", _rms_norm))
        stack.enter_context(patched(F, "scaled_dot_product_attention", _scaled_dot_product_attention))
        stack.enter_context(patched(F, "dropout", _dropout))
        for owner, name, decided in decisions():
            stack.enter_context(patched(owner, name, decided))
        yield
