"""Ring attention on real ranks is attention, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from autoplan.apply import ring
from autoplan.apply.local_ops import local_ops
from autoplan.errors import UsageError
from tests.apply.ranks import run

PART = 6
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"heads": 3, "key_heads": 3, "causal": False},
    "causal": {"heads": 3, "key_heads": 3, "causal": True},
    "shared keys": {"heads": 6, "key_heads": 2, "causal": False},
    "causal, shared keys": {"heads": 6, "key_heads": 2, "causal": True, "scale": 0.3},
    "other keys": {"heads": 4, "key_heads": 1, "causal": False, "keys": 4},
}


def tensors(world: int, heads: int, key_heads: int, keys: int = PART) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((heads, PART), (key_heads, keys), (key_heads, keys))
    made = [torch.randn(2, h, length * world, 8, dtype=torch.float64, requires_grad=True) for h, length in shapes]
    return [*made, torch.randn(2, heads, PART * world, 8, dtype=torch.float64)]


def errors(products: bool) -> dict[str, float]:
    """Largest difference of the result and the gradients of this rank's part."""
    if products:
        ring.has_flash = lambda query: False
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, form in FORMS.items():
        form = dict(form)
        causal, scale = form.pop("causal"), form.pop("scale", None)
        *given, gradient = tensors(world, **form)
        shared = given[0].shape[1] != given[1].shape[1]
        out = F.scaled_dot_product_attention(*given, is_causal=causal, scale=scale, enable_gqa=shared)
        expected = [out, *torch.autograd.grad(out, given, gradient)]
        parts = [tensor.detach().chunk(world, 2)[rank].requires_grad_() for tensor in given]
        part = ring.ring_attention(*parts, dist.group.WORLD, causal, scale)
        got = [part, *torch.autograd.grad(part, parts, gradient.chunk(world, 2)[rank])]
        found[name] = max((a.chunk(world, 2)[rank] - b).abs().max().item() for a, b in zip(expected, got, strict=True))
    return found


@pytest.mark.gloo
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_it_is_attention(world: int) -> None:
    for found in run(world, errors, False):
        assert all(error < 1e-13 for error in found.values()), found


@pytest.mark.gloo
def test_without_a_kernel_it_is_the_same() -> None:
    for found in run(2, errors, True):
        assert all(error < 1e-13 for error in found.values()), found


def refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    ring.use(mesh, "ring")
    spread = [DTensor.from_local(torch.randn(1, 2, 3, 4), mesh, [Shard(2)]) for _ in range(3)]
    told = []
    for options in ({"dropout_p": 0.1}, {"attn_mask": torch.ones(6, 6, dtype=torch.bool)}, {"is_causal": True}):
        with local_ops(mesh), pytest.raises(UsageError) as error:
            F.scaled_dot_product_attention(*spread, **options)
        told.append(error.value.message)
    return told


@pytest.mark.gloo
def test_what_it_can_not_do_is_refused() -> None:
    for told in run(2, refusals):
        assert ["no mask" in text for text in told] == [True, True, False]
        assert "3 positions of a rank can't be halved" in told[2]
