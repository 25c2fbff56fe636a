"""The graph of a published run's model: the two examples, a GPT with the attention of 2021 (scores in memory), and for mixtures
of experts those of transformers, with the sizes that a row tells.

Two layers are enough where a run's own number of layers is counted when it is priced: equal layers have one body.
"""

from __future__ import annotations

import warnings
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoplan.capture import capture_module, huggingface, load_model
from autoplan.capture.fake import build_on_meta
from autoplan.graph import Graph

EXAMPLES = Path(__file__).parents[1] / "examples"


class Experts(NamedTuple):
    """The mixture in a layer."""

    latent: bool
    """Attention is DeepSeek's, by its own sizes; else grouped heads."""
    head: int
    """Size of a head."""
    number: int
    chosen: int
    ffn: int
    shared: int
    """Size of what all tokens pass besides; 0: nothing."""
    plain: bool = False
    """The layers are those without experts with which such a model begins."""


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
    experts: Experts | None = None


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
def graph_of(shape: Shape, layers: int = 2) -> Graph:
    if shape.experts is not None:
        return _mixture(shape, shape.experts, layers)
    sizes: dict[str, float] = {
        "layers": layers,
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


def _mixture(shape: Shape, experts: Experts, layers: int) -> Graph:
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.ffn,
        "moe_intermediate_size": experts.ffn,
        "num_experts_per_tok": experts.chosen,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.seq_len,
        "tie_word_embeddings": shape.tied,
    }
    if experts.latent:
        shared = {"n_shared_experts": experts.shared // experts.ffn, "first_k_dense_replace": layers if experts.plain else 0}
        config = AutoConfig.for_model("deepseek_v3", **sizes, **shared, n_routed_experts=experts.number)
        config.architectures = ["DeepseekV3ForCausalLM"]
    else:
        config = AutoConfig.for_model("qwen3_moe", **sizes, num_experts=experts.number, head_dim=experts.head)
        config.architectures = ["Qwen3MoeForCausalLM"]
    name = f"{shape.hidden}x{shape.seq_len}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = build_on_meta(partial(huggingface.build, config, name))
        return capture_module(module, partial(huggingface.example_inputs, config, name, shape.seq_len), None, name=name)
