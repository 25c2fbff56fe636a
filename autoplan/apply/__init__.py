"""(nn.Module, Plan) -> the same module, run in parallel on PyTorch's own engine."""

from __future__ import annotations

from autoplan.apply.assemble import apply
from autoplan.apply.model import ParallelModel

__all__ = ["ParallelModel", "apply"]
