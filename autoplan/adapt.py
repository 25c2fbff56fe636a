"""Well-known library modules in a form whose operations can be sharded; results, parameters and names stay the same.

`nn.MultiheadAttention` hides its projections in one C++-like function with a packed weight. Written out with `F.linear`,
`chunk`, `scaled_dot_product_attention` and a *call* of `out_proj`, every step is an operation that `capture` sees and
`apply` can spread over devices. Both use this file, so that what is planned is what runs.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def adapt(module: nn.Module) -> None:
    """Rewrites, in place, the parts of `module` that have an equal, shardable form."""
    for part in module.modules():
        if type(part) is nn.MultiheadAttention and _is_plain(part):
            part.forward = MethodType(_attention, part)  # type: ignore[method-assign]
        elif isinstance(part, nn.TransformerEncoder):
            part.enable_nested_tensor = False
            part.use_nested_tensor = False
        elif isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # says that there is no fused inference kernel for it


def _is_plain(part: nn.MultiheadAttention) -> bool:
    return part._qkv_same_embed_dim and part.bias_k is None and part.bias_v is None and not part.add_zero_attn


def _attention(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`nn.MultiheadAttention.forward`, step by step."""
    if need_weights or query.dim() != 3:
        return nn.MultiheadAttention.forward(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    q, k, v = _project(self, query, key, value)
    if not self.batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    batch, length, _ = q.shape
    q, k, v = (x.view(batch, x.size(1), self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
    causal = is_causal and key_padding_mask is None
    mask = None if causal else _mask(attn_mask, key_padding_mask, q, self.num_heads)
    dropout = self.dropout if self.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    out = out.transpose(1, 2).reshape(batch, length, self.embed_dim)
    if not self.batch_first:
        out = out.transpose(0, 1)
    return self.out_proj(out), None


def _project(self: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    weight, bias = self.in_proj_weight, self.in_proj_bias
    if query is key and key is value:
        return F.linear(query, weight, bias).chunk(3, dim=-1)
    wq, wk, wv = weight.chunk(3)
    bq, bk, bv = (None, None, None) if bias is None else bias.chunk(3)
    return F.linear(query, wq, bq), F.linear(key, wk, bk), F.linear(value, wv, bv)


def _mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, heads: int) -> Tensor | None:
    """The two masks as one that is added to the scores: [1 or batch, 1 or heads, query, key]."""
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, q)
        mask = mask.view(1, 1, *mask.shape) if mask.dim() == 2 else mask.view(-1, heads, *mask.shape[1:])
    if padding is not None:
        pad = _additive(padding, q)
        pad = pad.view(pad.size(0), 1, 1, pad.size(1))
        mask = pad if mask is None else mask + pad
    return mask


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
