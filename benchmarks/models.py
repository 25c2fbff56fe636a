"""The graph of a published run's model: the two examples, and a GPT with the attention of 2021 (scores in memory).

Only two layers are captured: equal layers have one body, and a run's own number of layers is counted when it is priced.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoplan.capture import capture_module, load_model
from autoplan.capture.fake import build_on_meta
from autoplan.graph import Graph

EXAMPLES = Path(__file__).parents[1] / "examples"


class Shape(NamedTuple):
    """What decides a graph."""

    gated: bool
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    seq_len: int
    tied: bool
    unfused: bool
    """Attention scores are written to memory, with a fused scale-mask-softmax."""
    dropout: float


class ScoresInMemory(nn.Module):
    """Attention as Megatron-LM of 2021 runs it: two batched products around a fused softmax, and a dropout."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.hidden, self.head_dim, self.dropout = old.hidden, old.head_dim, old.dropout
        self.c_attn, self.c_proj = old.c_attn, old.c_proj

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.c_attn(x).split(self.hidden, dim=2)
        q = q.view(batch, length, -1, self.head_dim).transpose(1, 2)
        k = k.view(batch, length, -1, self.head_dim).transpose(1, 2)
        v = v.view(batch, length, -1, self.head_dim).transpose(1, 2)
        scores = torch.softmax(q @ k.transpose(2, 3), dim=-1)
        if self.dropout:
            scores = nn.functional.dropout(scores, self.dropout, self.training)
        return self.c_proj((scores @ v).transpose(1, 2).reshape(batch, length, -1))


@lru_cache(maxsize=256)
def graph_of(shape: Shape) -> Graph:
    sizes: dict[str, float] = {
        "layers": 2,
        "hidden": shape.hidden,
        "heads": shape.heads,
        "ffn": shape.ffn,
        "vocab": shape.vocab,
        "seq_len": shape.seq_len,
    }
    if shape.gated:
        loaded = load_model(str(EXAMPLES / "llama.py"), kwargs={**sizes, "kv_heads": shape.kv_heads})
    else:
        loaded = load_model(str(EXAMPLES / "gpt.py"), kwargs={**sizes, "dropout": shape.dropout})
    module = build_on_meta(loaded.build)
    if shape.gated and shape.tied:
        module.head.weight = module.embedding.weight
    if not shape.gated and not shape.tied:
        module.lm_head.weight = nn.Parameter(torch.empty_like(module.wte.weight))
    if shape.unfused:
        for block in module.h:
            block.attn = ScoresInMemory(block.attn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return capture_module(module, loaded.example_inputs, loaded.loss_fn, name=f"{shape.hidden}x{shape.seq_len}")
