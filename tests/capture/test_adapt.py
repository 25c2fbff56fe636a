"""Adapted modules compute what they computed before."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from autoplan.adapt import adapt

D, HEADS, T, S, B = 16, 4, 5, 7, 3
KINDS = ("none", "bool", "float", "3d", "padding", "both", "causal", "causal and padding")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def masks(kind: str, length: int, source: int) -> dict[str, Tensor | bool]:
    future = torch.ones(length, source, dtype=torch.bool).triu(1)
    padding = torch.zeros(B, source, dtype=torch.bool)
    padding[1, -2:] = True
    return {
        "none": {},
        "bool": {"attn_mask": future},
        "float": {"attn_mask": torch.randn(length, source, dtype=torch.float64)},
        "3d": {"attn_mask": torch.randn(B * HEADS, length, source, dtype=torch.float64)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": future, "key_padding_mask": padding},
        "causal": {"attn_mask": future, "is_causal": True},
        "causal and padding": {"attn_mask": future, "key_padding_mask": padding, "is_causal": True},
    }[kind]


@pytest.mark.parametrize(
    ("batch_first", "crossed", "bias", "kind"),
    [*itertools.product((True, False), (True, False), (True, False), KINDS)],
)
def test_attention(batch_first: bool, crossed: bool, bias: bool, kind: str) -> None:
    plain = nn.MultiheadAttention(D, HEADS, bias=bias, batch_first=batch_first, dtype=torch.float64)
    changed = copy.deepcopy(plain)
    adapt(changed)
    source = S if crossed else T
    x = torch.randn(B, T, D, dtype=torch.float64)
    y = torch.randn(B, S, D, dtype=torch.float64) if crossed else x
    if not batch_first:
        x, y = x.transpose(0, 1), (y.transpose(0, 1) if crossed else y)
        y = y if crossed else x
    options = masks(kind, T, source)
    results = []
    for module in (plain, changed):
        out, weights = module(x, y, y, need_weights=False, **options)
        assert weights is None
        out.square().sum().backward()
        results.append((out, [p.grad for p in module.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert list(plain.state_dict()) == list(changed.state_dict())


def test_weights_and_single_samples_take_the_original_way() -> None:
    plain = nn.MultiheadAttention(D, HEADS, batch_first=True)
    changed = copy.deepcopy(plain)
    adapt(changed)
    x = torch.randn(B, T, D)
    torch.testing.assert_close(plain(x, x, x), changed(x, x, x))
    torch.testing.assert_close(plain(x[0], x[0], x[0], need_weights=False)[0], changed(x[0], x[0], x[0], need_weights=False)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", [True, False])
def test_a_whole_transformer(training: bool) -> None:
    plain = nn.Transformer(D, HEADS, 2, 2, 32, 0.0, batch_first=True, dtype=torch.float64).train(training)
    changed = copy.deepcopy(plain)
    adapt(changed)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, -1] = True
    inputs = torch.randn(B, S, D, dtype=torch.float64), torch.randn(B, T, D, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    options = {"tgt_mask": mask, "src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_is_causal": True}
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(plain(*inputs, **options), changed(*inputs, **options), rtol=1e-12, atol=1e-12)
