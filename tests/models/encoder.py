"""A classifier of sequences on `nn.TransformerEncoder`: padding, a dict of inputs, logits out and a loss function beside it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FULL = {"layers": 24, "hidden": 1024, "heads": 16, "ffn": 4096, "vocab": 30522, "seq_len": 512}


class Classifier(nn.Module):
    def __init__(self, layers: int, hidden: int, heads: int, ffn: int, vocab: int, seq_len: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        self.positions = nn.Parameter(torch.zeros(seq_len, hidden))
        layer = nn.TransformerEncoderLayer(hidden, heads, ffn, dropout, F.gelu, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(hidden), enable_nested_tensor=False)
        self.head = nn.Linear(hidden, 10)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.embedding(batch["ids"]) + self.positions
        x = self.encoder(x, src_key_padding_mask=batch["padding"])
        return self.head(x[:, 0])


def build_model(dropout: float = 0.1, **changes: int) -> nn.Module:
    return Classifier(**{**FULL, **changes}, dropout=dropout)


def example_inputs(batch_size: int, dropout: float = 0.1, **changes: int) -> dict[str, dict[str, Tensor]]:
    settings = {**FULL, **changes}
    shape = (batch_size, settings["seq_len"])
    padding = torch.zeros(shape, dtype=torch.bool)
    padding[:, -2:] = True
    labels = torch.randint(0, 10, (batch_size,))
    return {"batch": {"ids": torch.randint(0, settings["vocab"], shape), "padding": padding, "labels": labels}}


def loss_fn(output: Tensor, batch: dict[str, dict[str, Tensor]]) -> Tensor:
    return F.cross_entropy(output, batch["batch"]["labels"])
