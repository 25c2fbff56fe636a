"""Cross-entropy of logits whose classes are spread over the tp axis: two small collectives forward, none backward.

Every rank holds the columns `[rank * classes, (rank + 1) * classes)`. With m the row maximum over all ranks,
loss = log(sum exp(logit - m)) - (logit[target] - m): the maximum is one all_reduce, the sum and the target's logit
travel together in a second one. The gradient, softmax - onehot, needs only what a rank has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, mesh: DeviceMesh, ignore_index: int, reduction: str
    ) -> torch.Tensor:
        group, classes = mesh.get_group(), logits.shape[1]
        wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        top = wide.amax(1)
        _reduce(top, dist.ReduceOp.MAX, group)
        shifted = wide - top[:, None]
        local = target - mesh.get_local_rank() * classes
        elsewhere = (local < 0) | (local >= classes)
        local = local.masked_fill(elsewhere, 0)
        chosen = shifted.gather(1, local[:, None])[:, 0].masked_fill(elsewhere, 0.0)
        softmax = shifted.exp_()
        sums = torch.stack([softmax.sum(1), chosen])
        _reduce(sums, dist.ReduceOp.SUM, group)
        ignored = target == ignore_index
        losses = (sums[0].log() - sums[1]).masked_fill(ignored, 0.0)
        scale = (~ignored).to(losses.dtype)
        if reduction == "mean":
            scale = scale / scale.sum()
        ctx.save_for_backward(softmax.div_(sums[0][:, None]), local, elsewhere, scale)
        ctx.dtype = logits.dtype
        result = losses if reduction == "none" else (losses * scale).sum()
        return result.to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        softmax, local, elsewhere, scale = ctx.saved_tensors
        onehot = (~elsewhere).to(softmax.dtype)[:, None]
        columns = softmax.clone().scatter_add_(1, local[:, None], -onehot)
        return columns.mul_((gradient * scale)[:, None]).to(ctx.dtype), None, None, None, None


def _reduce(tensor: torch.Tensor, operation: Any, group: dist.ProcessGroup) -> None:
    if not tensor.is_meta:  # else shapes alone are asked for
        dist.all_reduce(tensor, operation, group)


def vocab_parallel_cross_entropy(logits: DTensor, target: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    """Cross-entropy of `[rows, classes]` logits that are Shard(1), as a replicated tensor."""
    mesh = logits.device_mesh
    local = logits.to_local(grad_placements=[Shard(1)])
    loss: torch.Tensor = _VocabParallel.apply(local, target, mesh, ignore_index, reduction)
    return DTensor.from_local(loss, mesh, [Replicate()], run_check=False)
