"""GPT-2 in plain PyTorch: one linear for q, k and v, learned positions, LayerNorm first, head tied to the embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {
    "124M": {"layers": 12, "hidden": 768, "heads": 12, "ffn": 3072, "vocab": 50257, "seq_len": 1024},
    "350M": {"layers": 24, "hidden": 1024, "heads": 16, "ffn": 4096, "vocab": 50257, "seq_len": 1024},
    "774M": {"layers": 36, "hidden": 1280, "heads": 20, "ffn": 5120, "vocab": 50257, "seq_len": 1024},
    "1.5B": {"layers": 48, "hidden": 1600, "heads": 25, "ffn": 6400, "vocab": 50257, "seq_len": 1024},
}


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.hidden, self.head_dim, self.dropout = hidden, hidden // heads, dropout
        self.c_attn = nn.Linear(hidden, 3 * hidden)
        self.c_proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.c_attn(x).split(self.hidden, dim=2)
        q = q.view(batch, length, -1, self.head_dim).transpose(1, 2)
        k = k.view(batch, length, -1, self.head_dim).transpose(1, 2)
        v = v.view(batch, length, -1, self.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.c_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(hidden, ffn)
        self.c_proj = nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden)
        self.attn = Attention(hidden, heads, dropout)
        self.ln_2 = nn.LayerNorm(hidden)
        self.mlp = MLP(hidden, ffn)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x)))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    def __init__(self, layers: int, hidden: int, heads: int, ffn: int, vocab: int, seq_len: int, dropout: float) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, hidden)
        self.wpe = nn.Embedding(seq_len, hidden)
        self.dropout = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(hidden, heads, ffn, dropout) for _ in range(layers))
        self.ln_f = nn.LayerNorm(hidden)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        self.lm_head.weight = self.wte.weight
        self.apply(initialise)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.dropout(self.wte(input_ids) + self.wpe(positions))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def build_model(size: str = "124M", dropout: float = 0.0, **changes: int) -> nn.Module:
    return GPT(**{**SIZES[size], **changes}, dropout=dropout)


def example_inputs(batch_size: int, size: str = "124M", dropout: float = 0.0, **changes: int) -> dict[str, Tensor]:
    settings = {**SIZES[size], **changes}
    tokens = torch.randint(0, settings["vocab"], (batch_size, settings["seq_len"] + 1))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}
