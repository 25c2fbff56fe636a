"""How single calls are named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoplan.capture import capture_module
from autoplan.graph import Op

B, T, H = 2, 6, 8


def op_of(function: Callable[[Tensor], Tensor]) -> Op:
    """The first operation of `function` on a [batch, 6, 8] tensor that needs a gradient."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(H, H)

        def forward(self, x: Tensor) -> Tensor:
            out = function(self.fc(x))
            out = out if isinstance(out, Tensor) else out[0]
            return out.float().sum()

    g = capture_module(Model(), lambda batch: {"x": torch.randn(batch, T, H)}, compute_dtype="float32")
    start = next(i for i, op in enumerate(g.outer.ops) if op.kind == "exit")
    return g.outer.ops[start + 1]


@pytest.mark.parametrize(
    ("function", "kind", "dims", "dim_map", "linear"),
    [
        (lambda x: x.transpose(1, -1), "dims", (), (0, 2, 1), False),
        (lambda x: x.permute(2, 0, 1), "dims", (), (2, 0, 1), False),
        (lambda x: x.mT, "dims", (), (0, 2, 1), False),
        (lambda x: x[:, None, :, :4], "dims", (), (0, -1, 1, -1), False),
        (lambda x: x[:, -1], "dims", (), (0, 2), False),
        (lambda x: x[..., 0:T, :], "dims", (), (0, 1, 2), False),
        (lambda x: x.unsqueeze(-1), "dims", (), (0, 1, 2, -1), False),
        (lambda x: x.narrow(1, 0, 2), "dims", (), (0, -1, 2), False),
        (lambda x: x[:, :1].expand(-1, 5, -1), "dims", (), (0, -1, 2), False),
        (lambda x: x.mean(-1, keepdim=True), "dims", (), (0, 1, -1), False),
        (lambda x: x.sum(dim=(1,)), "dims", (), (0, 2), False),
        (lambda x: x.amax(-1, keepdim=True), "along", (2,), (), False),
        (lambda x: x.amax(1), "opaque", (), (), False),
        (lambda x: x.repeat_interleave(3, dim=1), "dims", (1,), (0, -1, 2), False),
        (lambda x: x.softmax(-1), "along", (2,), (), False),
        (lambda x: F.log_softmax(x, dim=1), "along", (1,), (), False),
        (lambda x: torch.cumsum(x, -2), "along", (1,), (), False),
        (lambda x: x.view(-1, T, 2, 4), "view", (), (), False),
        (lambda x: x.flatten(0, 1), "view", (), (), False),
        (lambda x: x.unflatten(-1, (2, 4)), "view", (), (), False),
        (lambda x: x.chunk(2, -1), "split", (2,), (), False),
        (lambda x: x.split([2, 6], dim=2), "split", (2,), (), False),
        (lambda x: x.unbind(1), "split", (1,), (0, 2), False),
        (lambda x: torch.cat([x, x], -1), "cat", (2,), (), False),
        (lambda x: torch.stack([x, x], 1), "cat", (1,), (), False),
        (lambda x: x + x, "pointwise", (), (), True),
        (lambda x: x + 1, "pointwise", (), (), False),
        (lambda x: 1 - x, "pointwise", (), (), False),
        (lambda x: x * 2, "pointwise", (), (), True),
        (lambda x: x / 2, "pointwise", (), (), True),
        (lambda x: 2 / x, "pointwise", (), (), False),
        (lambda x: x * x, "pointwise", (), (), False),
        (lambda x: -x, "pointwise", (), (), True),
        (lambda x: x.to(torch.bfloat16), "pointwise", (), (), True),
        (lambda x: x.clone(), "pointwise", (), (), True),
        (lambda x: F.gelu(x), "pointwise", (), (), False),
        (lambda x: F.relu(x, inplace=True), "pointwise", (), (), False),
        (lambda x: F.dropout(x, 0.5), "pointwise", (), (), False),
        (lambda x: torch.clamp(x, 0, 1), "pointwise", (), (), False),
        (lambda x: F.layer_norm(x, (H,)), "norm", (1,), (), False),
        (lambda x: F.rms_norm(x, (T, H)), "norm", (2,), (), False),
        (lambda x: torch.einsum("bth->bht", x), "opaque", (), (), False),
        (lambda x: torch.sort(x), "opaque", (), (), False),
    ],
)
def test_kind(
    function: Callable[[Tensor], Tensor], kind: str, dims: tuple[int, ...], dim_map: tuple[int, ...], linear: bool
) -> None:
    op = op_of(function)
    assert (op.kind, op.dims, op.linear) == (kind, dims, linear)
    if kind in ("dims", "split"):
        assert op.dim_map == dim_map


def test_a_call_that_returns_its_argument_is_no_operation() -> None:
    assert op_of(lambda x: x.contiguous().to(torch.float32)).name == "sum"


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "cross_entropy"),
        ({"ignore_index": 3}, "cross_entropy"),
        ({"label_smoothing": 0.1}, "opaque"),
        ({"reduction": "sum"}, "opaque"),
    ],
)
def test_cross_entropy_is_the_plain_one_or_opaque(options: dict[str, float], kind: str) -> None:
    def loss(x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return F.cross_entropy(x, x.argmax(-1), **options)  # type: ignore[arg-type]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(H, H)

        def forward(self, x: Tensor) -> Tensor:
            return loss(self.fc(x))

    g = capture_module(Model(), lambda batch: {"x": torch.randn(batch, T, H)}, compute_dtype="float32")
    assert g.outer.ops[-1].kind == kind
