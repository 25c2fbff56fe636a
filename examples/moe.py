"""A mixture of experts in plain PyTorch, like Mixtral: Llama's attention, and in every layer a few of many feed-forwards."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {
    "1B": {
        **{"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 12, "ffn": 1536, "vocab": 32000, "seq_len": 2048},
        **{"experts": 32, "chosen": 4},
    },
    "8x7B": {
        **{"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 32000, "seq_len": 4096},
        **{"experts": 8, "chosen": 2},
    },
    "8x22B": {
        **{"layers": 56, "hidden": 6144, "heads": 48, "kv_heads": 8, "ffn": 16384, "vocab": 32768, "seq_len": 8192},
        **{"experts": 8, "chosen": 2},
    },
}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + d/2]) of every head by their position's angle."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.wq = nn.Linear(hidden, heads * self.head_dim, bias=False)
        self.wk = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(heads * self.head_dim, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.wq(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        k = self.wk(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))


class Experts(nn.Module):
    """All feed-forwards of a layer at once: `choice` says which ones each row goes through, `weights` how much each counts."""

    def __init__(self, experts: int, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, hidden, ffn).normal_(std=hidden**-0.5))
        self.up = nn.Parameter(torch.empty(experts, hidden, ffn).normal_(std=hidden**-0.5))
        self.down = nn.Parameter(torch.empty(experts, ffn, hidden).normal_(std=ffn**-0.5))

    def forward(self, rows: Tensor, choice: Tensor, weights: Tensor) -> Tensor:
        chosen = choice.flatten()
        counts = chosen.new_zeros(len(self.gate)).scatter_add(0, chosen, torch.ones_like(chosen))
        ends = counts.cumsum(0).to(torch.int32)
        order = chosen.argsort(stable=True)  # rows of one expert stand together
        row = order // choice.shape[1]
        x = rows[row]
        out = F.silu(F.grouped_mm(x, self.gate, offs=ends)) * F.grouped_mm(x, self.up, offs=ends)
        out = F.grouped_mm(out, self.down, offs=ends) * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(rows).index_add(0, row, out)


class Mixture(nn.Module):
    def __init__(self, hidden: int, ffn: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = Experts(experts, hidden, ffn)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, choice = self.router(rows).float().softmax(dim=-1).topk(self.chosen, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.experts(rows, choice, weights.to(x.dtype)).view(x.shape)


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, ffn: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.attention = Attention(hidden, heads, kv_heads)
        self.mixture_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.mixture = Mixture(hidden, ffn, experts, chosen)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mixture(self.mixture_norm(x))


class MoE(nn.Module):
    def __init__(
        self, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, seq_len: int, experts: int, chosen: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Block(hidden, heads, kv_heads, ffn, experts, chosen) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.head = nn.Linear(hidden, vocab, bias=False)
        head_dim = hidden // heads
        speeds = 500000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(seq_len), speeds).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        length = input_ids.shape[1]
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def build_model(size: str = "8x7B", **changes: int) -> nn.Module:
    return MoE(**{**SIZES[size], **changes})


def example_inputs(batch_size: int, size: str = "8x7B", **changes: int) -> dict[str, Tensor]:
    settings = {**SIZES[size], **changes}
    tokens = torch.randint(0, settings["vocab"], (batch_size, settings["seq_len"] + 1))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}
