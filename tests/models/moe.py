"""A mixture of experts in plain PyTorch: a router, grouped matrix products, one shared expert; the first layers are dense."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FULL = {
    **{"layers": 27, "hidden": 2048, "heads": 16, "ffn": 1408, "vocab": 102400, "seq_len": 4096},
    **{"experts": 64, "chosen": 6, "dense": 1},
}


class FeedForward(nn.Module):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, ffn, bias=False)
        self.w2 = nn.Linear(ffn, hidden, bias=False)
        self.w3 = nn.Linear(hidden, ffn, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    """All experts at once: rows are sorted by expert, `counts` says how many each one gets."""

    def __init__(self, hidden: int, ffn: int, experts: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, hidden, ffn).normal_(std=0.02))
        self.w2 = nn.Parameter(torch.empty(experts, ffn, hidden).normal_(std=0.02))
        self.w3 = nn.Parameter(torch.empty(experts, hidden, ffn).normal_(std=0.02))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        up = F.silu(F.grouped_mm(x, self.w1, offs=ends)) * F.grouped_mm(x, self.w3, offs=ends)
        return F.grouped_mm(up, self.w2, offs=ends)


class Mixture(nn.Module):
    def __init__(self, hidden: int, ffn: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = Experts(hidden, ffn, experts)
        self.shared = FeedForward(hidden, ffn)
        self.register_buffer("load", torch.zeros(experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).float().sigmoid().topk(self.chosen, dim=-1)
        flat = chosen.flatten()
        counts = torch.zeros_like(self.load, dtype=torch.int64).scatter_add(0, flat, torch.ones_like(flat))
        with torch.no_grad():
            self.load += counts
        order = flat.argsort(stable=True)
        token = order // self.chosen
        out = self.experts(rows[token], counts) * weights.flatten()[order].to(x.dtype).unsqueeze(-1)
        return self.shared(rows).index_add(0, token, out).view_as(x)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, -1, self.head_dim).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, feed_forward: nn.Module) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.feed_forward(self.norm_2(x))


class Model(nn.Module):
    def __init__(
        self, layers: int, hidden: int, heads: int, ffn: int, vocab: int, seq_len: int, experts: int, chosen: int, dense: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleDict()
        for i in range(layers):
            part = FeedForward(hidden, 8 * ffn) if i < dense else Mixture(hidden, ffn, experts, chosen)
            self.layers[str(i)] = Block(hidden, heads, part)
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers.values():
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), labels.flatten())


def build_model(**changes: int) -> nn.Module:
    return Model(**{**FULL, **changes})


def example_inputs(batch_size: int, **changes: int) -> dict[str, Tensor]:
    settings = {**FULL, **changes}
    tokens = torch.randint(0, settings["vocab"], (batch_size, settings["seq_len"] + 1))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}
