"""Attention over the tp axis: each rank runs the model's own kernel for its own heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from autoplan.apply.packed import whole
from autoplan.apply.randomness import own_randomness


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> DTensor:
    """Attention of each rank's own heads; of all heads on every rank where they are not sharded."""
    tensors = [query, key, value]
    mesh = next(tensor.device_mesh for tensor in [*tensors, attn_mask] if isinstance(tensor, DTensor))
    by_heads = query.ndim == 4 and all(isinstance(t, DTensor) and t.placements[0] == Shard(1) for t in tensors)
    placement: Placement = Shard(1) if by_heads else Replicate()

    def local(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        tensor = tensor if by_heads else whole(tensor)
        return tensor.to_local(grad_placements=[placement])

    mask = attn_mask
    if mask is not None:
        mask = local_mask(mask, query.shape[1], mesh) if by_heads else local(mask)
    with own_randomness(mesh, by_heads and dropout_p > 0):
        out = F.scaled_dot_product_attention(
            local(query), local(key), local(value), mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return DTensor.from_local(out, mesh, [placement], run_check=False)


def local_mask(mask: torch.Tensor, heads: int, mesh: DeviceMesh) -> torch.Tensor:
    """The mask of this rank's heads."""
    per_head = mask.ndim >= 3 and mask.shape[-3] == heads and heads > 1
    if not isinstance(mask, DTensor):
        share = heads // mesh.size()
        return mask.narrow(-3, mesh.get_local_rank() * share, share) if per_head else mask
    if not per_head:
        return whole(mask).to_local(grad_placements=[Partial()])
    placement = Shard(mask.ndim - 3)
    return mask.redistribute(placements=[placement]).to_local(grad_placements=[placement])
