"""Low-rank adapters on a frozen GPT, a dataclass of inputs: only the adapters have gradients and optimizer states."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FULL = {"layers": 32, "hidden": 4096, "heads": 32, "ffn": 16384, "vocab": 50304, "seq_len": 2048, "rank": 16}


@dataclass
class Batch:
    ids: Tensor
    labels: Tensor


class Adapted(nn.Linear):
    """A frozen linear plus a trained product of two thin ones."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.weight.requires_grad = False
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, ffn: int, rank: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.norm_1, self.norm_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = Adapted(hidden, 3 * hidden, rank), Adapted(hidden, hidden, rank)
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)
        for part in (self.norm_1, self.norm_2, self.up, self.down):
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, -1, self.head_dim).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(out.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Model(nn.Module):
    def __init__(self, layers: int, hidden: int, heads: int, ffn: int, vocab: int, seq_len: int, rank: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden).requires_grad_(False)
        self.layers = nn.ModuleList(Block(hidden, heads, ffn, rank) for _ in range(layers))
        self.head = nn.Linear(hidden, vocab, bias=False).requires_grad_(False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x = self.embedding(batch.ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()), "logits": logits}


def build_model(**changes: int) -> nn.Module:
    return Model(**{**FULL, **changes})


def example_inputs(batch_size: int, **changes: int) -> dict[str, Batch]:
    settings = {**FULL, **changes}
    tokens = torch.randint(0, settings["vocab"], (batch_size, settings["seq_len"] + 1))
    return {"batch": Batch(tokens[:, :-1], tokens[:, 1:].contiguous())}
