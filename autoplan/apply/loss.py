"""The loss of one batch: the model's own, or what the caller's `loss_fn` makes of its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autoplan.apply.local_ops import local_ops
from autoplan.apply.tensor_parallel import plain
from autoplan.errors import UsageError

LossFn = Callable[[Any, dict[str, Any]], torch.Tensor]


def loss_of(
    model: nn.Module, inputs: dict[str, Any], batch: dict[str, Any], loss_fn: LossFn | None, tp: DeviceMesh | None
) -> torch.Tensor:
    """Call `model` with `inputs`, and `loss_fn` with what it returns and `batch`. Raises `UsageError` without a scalar."""
    output = model(**inputs)
    if loss_fn is not None:
        with local_ops(tp):
            output = loss_fn(output, batch)
    loss = output if isinstance(output, torch.Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        raise UsageError("the model returns no scalar loss.", "Pass loss_fn(output, batch) to autoplan.apply.")
    return plain(loss) if isinstance(loss, DTensor) else loss
