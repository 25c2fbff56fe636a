"""Tiny models of every shape that tensor parallelism meets, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, HIDDEN, HEADS, SEQ, LAYERS = 64, 32, 4, 16, 2


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv, self.size = HEADS, HEADS // 2, HIDDEN // HEADS
        self.wq = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.wk = nn.Linear(HIDDEN, self.kv * self.size, bias=False)
        self.wv = nn.Linear(HIDDEN, self.kv * self.size, bias=False)
        self.wo = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.heads, self.size)
        k = self.wk(x).view(b, t, self.kv, self.size)
        v = self.wv(x).view(b, t, self.kv, self.size).transpose(1, 2)

        def rotate(z):
            z1, z2 = z.chunk(2, -1)
            return z * cos[None, :t, None] + torch.cat((-z2, z1), -1) * sin[None, :t, None]

        q, k = rotate(q).transpose(1, 2), rotate(k).transpose(1, 2)
        k = k[:, :, None].expand(b, self.kv, 2, t, self.size).reshape(b, self.heads, t, self.size)
        v = v[:, :, None].expand(b, self.kv, 2, t, self.size).reshape(b, self.heads, t, self.size)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(b, t, HIDDEN))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.w2 = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(HIDDEN), Attention()
        self.ffn_norm, self.feed_forward = RMSNorm(HIDDEN), MLP()

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(LlamaBlock() for _ in range(LAYERS))
        self.norm = RMSNorm(HIDDEN)
        self.output = nn.Linear(HIDDEN, VOCAB, bias=False)
        size = HIDDEN // HEADS
        angles = torch.outer(torch.arange(SEQ).float(), 1e-4 ** (torch.arange(0, size, 2).float() / size))
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, idx, labels):
        x = self.tok(idx)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.output(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


class GPTAttention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.dropout = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN), dropout

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = (z.view(b, t, HEADS, c // HEADS).transpose(1, 2) for z in self.c_attn(x).split(c, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class GPTMLP(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.drop = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN), nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.c_proj(F.gelu(self.c_fc(x))))


class GPTBlock(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(HIDDEN), GPTAttention(dropout)
        self.ln_2, self.mlp = nn.LayerNorm(HIDDEN), GPTMLP(dropout)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Returns logits; learned positions, tied head, its own init."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(SEQ, HIDDEN)
        self.h = nn.ModuleList(GPTBlock(dropout) for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.wte.weight = self.lm_head.weight
        self.apply(self.init)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, 0.0, 0.02 / (2 * LAYERS) ** 0.5)

    def init(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Translator(nn.Module):
    """torch.nn.Transformer, encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.src, self.tgt = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(VOCAB, HIDDEN)
        self.pos = nn.Parameter(torch.randn(SEQ, HIDDEN) * 0.02)
        self.transformer = nn.Transformer(HIDDEN, HEADS, LAYERS, LAYERS, 4 * HIDDEN, dropout=0.0, batch_first=True)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, src, tgt, labels):
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.size(1), dtype=self.pos.dtype)
        h = self.transformer(self.src(src) + self.pos, self.tgt(tgt) + self.pos, tgt_mask=mask, tgt_is_causal=True)
        return F.cross_entropy(self.head(h).view(-1, VOCAB), labels.view(-1))


def hf_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        num_hidden_layers=LAYERS,
        max_position_embeddings=SEQ,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


FACTORIES: dict[str, Callable[[], nn.Module]] = {"llama": Llama, "gpt": GPT, "translator": Translator, "hf_llama": hf_llama}
NAMES = {
    "llama": ("idx", "labels"),
    "gpt": ("idx",),
    "translator": ("src", "tgt", "labels"),
    "hf_llama": ("input_ids", "labels"),
}


def double(name: str) -> Callable[[], nn.Module]:
    """A factory of the model in float64."""
    return lambda: FACTORIES[name]().double()


def gpt_loss(logits: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    targets = batch["idx"].roll(-1, 1)
    return F.cross_entropy(logits.view(-1, VOCAB), targets.reshape(-1))


def loss_of(name: str, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**batch)
    if name == "gpt":
        return gpt_loss(output, batch)
    return output if isinstance(output, torch.Tensor) else output.loss


def batches(name: str, samples: int = 8, steps: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{key: torch.randint(0, VOCAB, (samples, SEQ), generator=generator) for key in NAMES[name]} for _ in range(steps)]
