"""The examples, tiny, and small helpers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from autoplan.capture import LoadedModel, load_model

EXAMPLES = Path(__file__).parents[2] / "examples"

TINY = {
    "transformer": {"layers": "3", "hidden": "32", "heads": "4", "ffn": "64", "vocab": "50", "seq_len": "16", "dropout": "0.0"},
    "gpt": {"layers": "3", "hidden": "32", "heads": "4", "ffn": "64", "vocab": "50", "seq_len": "16"},
    "llama": {"layers": "3", "hidden": "32", "heads": "4", "kv_heads": "2", "ffn": "64", "vocab": "50", "seq_len": "16"},
    "hf_llama": {"layers": "3", "hidden": "32", "heads": "4", "kv_heads": "2", "ffn": "64", "vocab": "50", "seq_len": "16"},
}


def tiny(name: str, **changes: str) -> LoadedModel:
    return load_model(str(EXAMPLES / f"{name}.py"), {**TINY[name], **changes})


def real(loaded: LoadedModel, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return loaded.build().to(dtype)


def loss_of(module: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = module(**inputs)
    return output if isinstance(output, torch.Tensor) else output.loss
