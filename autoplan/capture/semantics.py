"""What a GPU would run: the kernel choices of CUDA, made on fake CPU tensors.

A build of PyTorch without CUDA cannot record CUDA kernels (a fake CUDA tensor aborts the process), and the CPU's own
choices keep other tensors for the backward pass: scores of `seq x seq` instead of flash attention's row statistics,
dropout masks as wide as the data, float32 copies inside RMSNorm. So the functions whose kernels differ are replaced here:

    scaled_dot_product_attention   flash, else memory-efficient      (torch's own order of preference)
    dropout                        native_dropout: a bool mask
    rms_norm                       one fused kernel, a float32 statistic a row
    .cuda(), device="cuda"         stay on the fake device
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
_attention: Callable[..., Tensor] = F.scaled_dot_product_attention
_dropout: Callable[..., Tensor] = F.dropout
_rms_norm: Callable[..., Tensor] = F.rms_norm

FLASH_HEAD_DIM = 256


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by the kernel that CUDA would take. float32 has no flash kernel."""
    if query.dim() != 4 or query.dtype == torch.float64 or not _fused(query, key, value, enable_gqa):
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    half = query.dtype in (torch.bfloat16, torch.float16) and key.dtype == value.dtype == query.dtype
    if half and attn_mask is None and query.size(-1) == value.size(-1) <= FLASH_HEAD_DIM:
        return _flash(query, key, value, dropout_p, is_causal, scale)
    return _memory_efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)


def _fused(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether a fused kernel takes these batches and heads. Others are broadcast, or refused, by the one in plain products."""
    heads, shared = query.size(1), key.size(1)
    grouped = enable_gqa and shared > 0 and heads % shared == 0
    return query.size(0) == key.size(0) == value.size(0) and shared == value.size(1) and (shared == heads or grouped)


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float) -> Tensor:
    width = query.size(-1)
    padding = -width % 8
    if padding:
        query, key, value = (F.pad(tensor, (0, padding)) for tensor in (query, key, value))
    out: Tensor = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return out[..., :width] if padding else out


def _memory_efficient(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float
) -> Tensor:
    if key.size(1) != query.size(1):
        key = key.repeat_interleave(query.size(1) // key.size(1), 1)
        value = value.repeat_interleave(query.size(1) // value.size(1), 1)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), float("-inf"))
        mask = mask.to(query.dtype).expand(query.size(0), query.size(1), query.size(2), key.size(2))
    statistics = any(tensor.requires_grad for tensor in (query, key, value))
    out: Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, statistics, dropout_p, is_causal, scale=scale
    )[0]
    return out


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`F.dropout` with a bool mask, as on CUDA."""
    if training and 0 < p < 1 and not inplace:
        return torch.native_dropout(input, p, True)[0]
    return _dropout(input, p, training, inplace)


def torch_dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """`torch.dropout`: the same."""
    return dropout(input, p, train)


def rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """`F.rms_norm` as one kernel."""
    if len(normalized_shape) != 1 or (weight is not None and weight.dtype != input.dtype):
        return _rms_norm(input, normalized_shape, weight, eps)
    epsilon = torch.finfo(input.dtype).eps if eps is None else eps
    out: Tensor = torch.ops.autoplan.rms_norm(input, weight, epsilon)[0]
    return out


REPLACED: dict[Any, Callable[..., Any]] = {
    _attention: attention,
    _dropout: dropout,
    torch.dropout: torch_dropout,
    _rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
}
"""The function that the user calls -> the one that runs."""

PATCHED: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attention,
    "dropout": _dropout,
    "rms_norm": _rms_norm,
}
"""Names of `torch.nn.functional` -> original: for calls inside composite functions, which no mode sees."""


def replaced(kernels: str) -> dict[Any, Callable[..., Any]]:
    """The function that the user calls -> the one that runs, for the kernels of a device. The CPU's are as they are."""
    return REPLACED if kernels == "cuda" else {torch.Tensor.cuda: stay}


def decisions() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Functions of transformers that decide by what fake tensors lack, as they decide on a GPU: (module, name, replacement)."""
    for module, name, decided in (
        ("masking_utils", "find_packed_sequence_indices", None),  # by values: no samples are packed
        ("integrations.moe", "_can_use_grouped_mm", True),  # up to torch 2.10 by addresses
    ):
        owner = sys.modules.get(f"transformers.{module}")
        if hasattr(owner, name):
            yield owner, name, lambda *args, decided=decided, **kwargs: decided


_AUTOCAST_INIT = torch.autocast.__init__


def autocast_init(self: torch.autocast, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> None:
    """`torch.autocast("cuda")` switches itself off where there is no CUDA; the CPU's takes its place."""
    if device_type == "cuda":
        device_type, dtype = "cpu", dtype or torch.float16
    _AUTOCAST_INIT(self, device_type, dtype, *args, **kwargs)


_AUTOCAST_FLOAT32 = {
    *("layer_norm", "group_norm", "norm", "rms_norm", "softmax", "log_softmax", "softmin", "cumsum", "cumprod", "sum", "prod"),
    *("exp", "expm1", "log", "log10", "log2", "log1p", "pow", "rpow", "reciprocal", "rsqrt", "softplus", "erfinv", "cosh"),
    *("sinh", "tan", "acos", "asin", "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
    *("kl_div", "binary_cross_entropy_with_logits", "cosine_similarity", "cdist", "renorm"),
}
"""What CUDA's autocast computes in float32, by `name_of`; the CPU's leaves most of it in the lower precision."""


def autocast_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call as CUDA's autocast would make them, where it differs from the CPU's."""
    if name not in _AUTOCAST_FLOAT32 or not torch.is_autocast_enabled("cpu"):
        return args, kwargs
    cast = lambda x: x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x  # noqa: E731
    return tuple(cast(x) for x in args), {key: cast(x) for key, x in kwargs.items()}


def on_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with every CUDA device replaced by the fake tensors' own."""
    if _is_cuda(kwargs.get("device")):
        kwargs = {**kwargs, "device": "cpu"}
    if func is torch.Tensor.to:
        args = tuple("cpu" if _is_cuda(argument) else argument for argument in args)
    elif func is torch.Tensor.cuda:
        args, kwargs = args[:1], {}
    return args, kwargs


def stay(tensor: Tensor) -> Tensor:
    """`Tensor.cuda` of a tensor that is there already."""
    return tensor


REPLACED[torch.Tensor.cuda] = stay


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


# aten._fused_rms_norm decomposes into float32 intermediates off CUDA, so a fake kernel of our own stands for it
_library = torch.library.Library("autoplan", "DEF")
_library.define("rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)")
_library.define("rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor, Tensor)")


@torch.library.register_fake("autoplan::rms_norm", lib=_library)
def _rms_norm_fake(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.register_fake("autoplan::rms_norm_backward", lib=_library)
def _rms_norm_backward_fake(grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if weight is None else torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor | None, None]:
    x, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.autoplan.rms_norm_backward(grad, x, weight, rstd)
    return grad_x, None if weight is None else grad_weight, None


torch.library.register_autograd("autoplan::rms_norm", _backward, setup_context=_save, lib=_library)
