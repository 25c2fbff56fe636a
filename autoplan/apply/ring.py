"""Ring attention, the second kind of the cp axis: keys and values travel round the ranks, and every rank keeps its queries.

A rank's queries meet the keys and values of one rank after another (`_Ring`; Ring Attention, arXiv:2310.01889): while the kernel
works on those that are here, the next ones arrive. Partial results `o_b` of blocks with log-sum-exps `l_b` add up to

    l = log sum_b exp(l_b)        o = sum_b exp(l_b - l) o_b

In the backward pass keys and values go round once more, and with them the gradients that they have got so far, which at the
end are home. Heads need not divide, and heads of keys that several queries share are not copied.

Of a causal mask a rank whose positions come first would have little to do. So each takes an early and a late part of the
sequence: cut in 2 cp pieces, rank r works on the pieces r and 2 cp - 1 - r, which are exchanged before and after (`_deal`).
Then everyone's work is the same in every round: the causal half of its own block, half of each other one.

    keys and values of an earlier rank     all queries, their first half
    ... of a later rank                    the second half of the queries, all of them

Sums are in float32 at least. Under selective recomputation the result is kept, and what arrives in the rounds isn't.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from autoplan.apply._torch import all_to_all, flash, flash_backward, has_flash, passed_on
from autoplan.apply.selective import as_one
from autoplan.errors import UsageError

Tensor = torch.Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> DTensor | None:
    """`F.scaled_dot_product_attention` of tensors that are cut along the sequence over cp; None where these are not."""
    tensors = (query, key, value)
    if not all(isinstance(tensor, DTensor) and tensor.ndim == 4 for tensor in tensors):
        return None
    mesh, placements = query.device_mesh, query.placements  # type: ignore[attr-defined]
    cp = (mesh.mesh_dim_names or ()).index("cp")
    if any(tensor.placements != placements for tensor in tensors) or placements[cp] != Shard(2):  # type: ignore[attr-defined]
        return None
    if attn_mask is not None or dropout_p > 0 or query.shape[-1] != value.shape[-1]:
        raise UsageError(
            "ring attention takes no mask and no dropout, and values as wide as queries.",
            "Plan again, or set mesh.cp_kind: ulysses.",
        )
    q, k, v = (tensor.to_local(grad_placements=placements) for tensor in tensors)  # type: ignore[attr-defined]
    out = ring_attention(q, k, v, mesh.get_group(cp), is_causal, scale)
    return DTensor.from_local(out, mesh, placements, run_check=False)


HANDLERS: dict[Any, Callable[..., Any]] = {F.scaled_dot_product_attention: attention}
"""What differs from `context_parallel` where attention is a ring."""


def use(mesh: DeviceMesh, kind: str) -> None:
    """Have `LocalOps` over `mesh` run attention as this kind."""
    mesh.attention_kind = kind  # type: ignore[attr-defined]


def is_used(mesh: DeviceMesh) -> bool:
    """Whether attention over `mesh` is a ring."""
    return getattr(mesh, "attention_kind", "") == "ring"


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Attention between the parts of a sequence that the ranks of `group` have, in their order: `[batch, heads, part, width]`."""
    pairs = torch.stack((key, value))
    if causal:
        query, pairs = _deal(query, 2, group, True), _deal(pairs, 3, group, True)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Ring.apply(query, pairs, group, causal, scale)
    return _deal(out, 2, group, False) if causal else out


def _deal(local: Tensor, dim: int, group: dist.ProcessGroup, out: bool) -> Tensor:
    found: Tensor = _Deal.apply(local, dim, group, out)
    return found


class _Deal(torch.autograd.Function):
    """Two neighbouring pieces of the sequence for an early and a late one (`out`), or the other way; backward the reverse."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, group: dist.ProcessGroup, out: bool) -> Tensor:
        if local.shape[dim] % 2:
            raise UsageError(
                f"{local.shape[dim]} positions of a rank can't be halved, as causal ring attention does.",
                f"Give sequences whose length divides by {2 * dist.get_world_size(group)}.",
            )
        ctx.dim, ctx.group, ctx.out = dim, group, out
        return _dealt(local, dim, group, out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _dealt(gradient, ctx.dim, ctx.group, not ctx.out), None, None, None


def _dealt(local: Tensor, dim: int, group: dist.ProcessGroup, out: bool) -> Tensor:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    near, spread = (2 * rank, 2 * rank + 1), (rank, 2 * size - 1 - rank)
    goes = [_worker(piece, size) for piece in near] if out else [piece // 2 for piece in spread]
    comes = [piece // 2 for piece in spread] if out else [_worker(piece, size) for piece in near]
    sent = local.unflatten(dim, (2, -1)).movedim(dim, 0)
    sent = (sent if goes[0] <= goes[1] else sent.flip(0)).contiguous()
    received = all_to_all(sent, [comes.count(r) for r in range(size)], [goes.count(r) for r in range(size)], group)
    received = received if comes[0] <= comes[1] else received.flip(0)
    return received.movedim(0, dim).flatten(dim, dim + 1)


def _worker(piece: int, size: int) -> int:
    """The rank that works on a piece of a causal sequence."""
    return min(piece, 2 * size - 1 - piece)


class _Block(NamedTuple):
    """What a rank does in one round: these of its queries with those of the keys that are here."""

    queries: slice
    keys: slice
    causal: bool


def _block(rank: int, source: int, length: int, causal: bool) -> _Block:
    every, half = slice(None), length // 2
    if not causal or source == rank:
        return _Block(every, every, causal)
    return _Block(every, slice(half), False) if source < rank else _Block(slice(half, None), every, False)


def _rounds(rank: int, size: int, length: int, causal: bool) -> Iterator[tuple[bool, _Block]]:
    """What is done in every round, and whether it is the last."""
    for step in range(size):
        yield step == size - 1, _block(rank, (rank - step) % size, length, causal)


class _Ring(torch.autograd.Function):
    """See the module. `pairs` are keys and values, one above the other."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, pairs: Tensor, group: dist.ProcessGroup, causal: bool, scale: float) -> Tensor:
        out, lse = as_one(_Ring, lambda: _forward(query, pairs, group, causal, scale))
        ctx.save_for_backward(query, pairs, out, lse)
        ctx.how = group, causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        of_query, of_pairs = _backward(gradient, *ctx.saved_tensors, *ctx.how)
        return of_query, of_pairs, None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _shares(heads: int, key_heads: int, device: torch.device) -> list[slice]:
    """The heads of queries that one call of the kernel takes, beside all of the keys': where it can't share, one for each."""
    several = heads // key_heads
    return [slice(None)] if device.type == "cuda" or several == 1 else [slice(i, None, several) for i in range(several)]


def _forward(query: Tensor, pairs: Tensor, group: dist.ProcessGroup, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    out = query.new_zeros(query.shape, dtype=_wide(query))
    lse = query.new_full(query.shape[:-1], -torch.inf, dtype=_wide(query))
    shares = _shares(query.shape[1], pairs.shape[2], query.device)
    kernel = flash if has_flash(query) else _products
    for last, (queries, keys, masked) in _rounds(rank, size, query.shape[2], causal):
        coming = None if last else passed_on(pairs, group)
        for heads in shares:
            key, value = pairs[:, :, :, keys]
            part, part_lse = kernel(query[:, heads, queries], key, value, masked, scale)
            _merge(out[:, heads, queries], lse[:, heads, queries], part, part_lse)
        if coming is not None:
            pairs = coming()
    return out.to(query.dtype), lse


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Put a block's result into those of the blocks before it."""
    out_of_all = torch.logaddexp(lse, part_lse)
    out.mul_((lse - out_of_all).exp_().unsqueeze(-1)).add_(part * (part_lse - out_of_all).exp_().unsqueeze(-1))
    lse.copy_(out_of_all)


def _backward(
    gradient: Tensor, query: Tensor, pairs: Tensor, out: Tensor, lse: Tensor, group: dist.ProcessGroup, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    dtype, of_query = pairs.dtype, torch.zeros_like(query, dtype=_wide(query))
    shares = _shares(query.shape[1], pairs.shape[2], query.device)
    kernel = flash_backward if has_flash(query) else _products_backward
    arriving: Callable[[], Tensor] | None = None
    for last, (queries, keys, masked) in _rounds(rank, size, query.shape[2], causal):
        coming = None if last else passed_on(pairs, group)
        of_pairs = torch.zeros_like(pairs, dtype=_wide(query))
        for heads in shares:
            of_out, own, result, rows = (tensor[:, heads, queries] for tensor in (gradient, query, out, lse))
            key, value = pairs[:, :, :, keys]
            found = kernel(of_out, own, result, rows, key, value, masked, scale)
            of_query[:, heads, queries] += found[0]
            of_pairs[0, :, :, keys] += found[1]
            of_pairs[1, :, :, keys] += found[2]
        if arriving is not None:
            of_pairs += arriving()
            arriving = None  # nobody needs it while more arrives
        arriving = passed_on(of_pairs, group)
        if coming is not None:
            pairs = coming()
    assert arriving is not None
    return of_query.to(query.dtype), arriving().to(dtype)


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Of queries `[batch, heads of keys, queries of one head, length, width]`; these too."""
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.unflatten(1, (key.shape[1], -1)).to(wide)
    scores = grouped @ key.to(wide).unsqueeze(2).mT * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(later, -torch.inf)
    return scores, grouped


def _products(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """What `flash` returns, of any format."""
    scores, _ = _scores(query, key, causal, scale)
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp_() @ value.to(scores.dtype).unsqueeze(2)
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def _products_backward(
    gradient: Tensor, query: Tensor, out: Tensor, lse: Tensor, key: Tensor, value: Tensor,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What `flash_backward` returns."""
    scores, grouped = _scores(query, key, causal, scale)
    shape, wide = (key.shape[1], -1), scores.dtype
    shares = (scores - lse.unflatten(1, shape).unsqueeze(-1)).exp_()
    of_out, result = (tensor.unflatten(1, shape).to(wide) for tensor in (gradient, out))
    of_value = (shares.mT @ of_out).sum(2)
    of_scores = shares * (of_out @ value.to(wide).unsqueeze(2).mT - (of_out * result).sum(-1, keepdim=True)) * scale
    of_query = (of_scores @ key.to(wide).unsqueeze(2)).flatten(1, 2)
    of_key = (of_scores.mT @ grouped).sum(2)
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)
