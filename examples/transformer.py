"""Translation with an encoder-decoder `nn.Transformer`, as in "Attention Is All You Need"."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD = 0


class Translator(nn.Module):
    def __init__(self, layers: int, hidden: int, heads: int, ffn: int, vocab: int, seq_len: int, dropout: float) -> None:
        super().__init__()
        self.scale = math.sqrt(hidden)
        self.embedding = nn.Embedding(vocab, hidden, padding_idx=PAD)
        self.positions = nn.Embedding(seq_len, hidden)
        self.dropout = nn.Dropout(dropout)
        self.transformer = nn.Transformer(hidden, heads, layers, layers, ffn, dropout, batch_first=True)
        self.head = nn.Linear(hidden, vocab)

    def embed(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.dropout(self.embedding(tokens) * self.scale + self.positions(positions))

    def forward(self, source: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        length = target.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        padding = source == PAD
        x = self.transformer(
            self.embed(source),
            self.embed(target),
            tgt_mask=future,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return F.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten(), ignore_index=PAD)


def build_model(
    layers: int = 6,
    hidden: int = 512,
    heads: int = 8,
    ffn: int = 2048,
    vocab: int = 32000,
    seq_len: int = 512,
    dropout: float = 0.1,
) -> nn.Module:
    return Translator(layers, hidden, heads, ffn, vocab, seq_len, dropout)


def example_inputs(batch_size: int, vocab: int = 32000, seq_len: int = 512, **_: float) -> dict[str, Tensor]:
    source = torch.randint(PAD + 1, vocab, (batch_size, seq_len))
    target = torch.randint(PAD + 1, vocab, (batch_size, seq_len + 1))
    source[:, -seq_len // 8 :] = PAD
    return {"source": source, "target": target[:, :-1], "labels": target[:, 1:]}
