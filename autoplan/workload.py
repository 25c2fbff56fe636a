"""What is asked of the machine: how many samples a step, in which number formats, with which optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["float64", "float32", "bfloat16", "float16"]
OptimizerName = Literal["adamw", "adam", "sgd", "sgd_momentum"]

OPTIMIZER_STATES: dict[str, int] = {"adamw": 2, "adam": 2, "sgd": 0, "sgd_momentum": 1}
"""Tensors of a parameter's size that the optimizer keeps, in the parameter's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One training step. Parameters, gradients and optimizer states are kept in `param_dtype`; FSDP casts parameters to
    `compute_dtype` for forward and backward and reduces gradients in `reduce_dtype`."""

    global_batch: int
    """Samples (sequences) of one optimizer step, over all devices."""
    param_dtype: DType = "float32"
    compute_dtype: DType = "bfloat16"
    reduce_dtype: DType = "float32"
    optimizer: OptimizerName = "adamw"
    compile: bool = False
    """Layers run through `torch.compile`, and are priced so (cost.fusion)."""
    expert_imbalance: float = 1.0
    """Where experts are dealt over devices: tokens of the fullest device over the mean. It multiplies what that device
    computes, sends and keeps of them; 1 is a router that balances perfectly."""
