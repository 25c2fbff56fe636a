"""The ep axis: the experts of a layer are dealt over devices, and the rows of tokens travel to them and back.

A module of experts (`strategy.Experts`) is called on every rank of an ep group with other tokens. Its `forward` is wrapped:

    the tokens' rows, once for each expert that they chose, in the order of the experts
        -- all_to_all -->  on each rank the rows of its experts  -- the module's own forward -->  their results
        -- all_to_all -->  the results, where the rows came from

No row is dropped, however many one expert gets: the ranks tell each other the numbers before. While its own forward runs,
the module looks as if it had a rank's share of the experts alone, in plain parameters.

Over tp tokens are replicated at the module's border: each rank takes its part of the rows, and the results are gathered.
An expert's gradient is a sum over the tokens of all ranks, of which FSDP takes a mean over efsdp where over dp_shard it is
meant: the gradients of rows are scaled while they are with the experts (`_Send`), which costs no memory.

On meta, where shapes are asked for, and in a process group in which nobody else is there, nobody knows the numbers: all
experts get the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from autoplan.apply._torch import StridedShard, all_to_all
from autoplan.apply.packed import whole
from autoplan.plan import Plan
from autoplan.strategy import Experts


def dealt(plan: Plan) -> dict[str, Experts]:
    """The modules of experts that are dealt over devices, by full name."""
    if plan.mesh.ep == 1:
        return {}
    return {
        ".".join(filter(None, (layer, experts.module))): experts
        for layer, strategy in plan.layers()
        for experts in strategy.sharding.experts
    }


def install(model: nn.Module, plan: Plan, ep: DeviceMesh, spread: DeviceMesh | None) -> None:
    """Have every module of experts in `model` send its rows over `ep`; `spread` is where the tokens are replicated or cut."""
    for name, experts in dealt(plan).items():
        module = model.get_submodule(name)
        gain = plan.mesh.cp * plan.mesh.tp / plan.mesh.ep
        module.forward = _wrapped(module, Dealt(module, module.forward, experts, ep, gain), spread)


def _wrapped(module: nn.Module, run: Dealt, spread: DeviceMesh | None) -> Callable[..., Any]:
    names = list(inspect.signature(module.forward).parameters)

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
        call = run.chosen if run.experts.form == "chosen" else run.sorted
        return call(*given) if spread is None else _in_parts(call, given, run.experts.form, spread)

    return forward


def _in_parts(call: Callable[..., torch.Tensor], given: list[torch.Tensor], form: str, spread: DeviceMesh) -> torch.Tensor:
    """`call` with this rank's part of the rows; of the whole tensor where all ranks have it."""
    rows, *others = (_as_dtensor(tensor, spread) for tensor in given)
    mine = rows.placements[0]
    cut = isinstance(mine, Shard | StridedShard) and mine.dim == 0
    placement = mine if cut else Shard(0)
    parts = [_part(rows, placement)]
    if form == "chosen":
        parts += [_part(tensor, placement) for tensor in others]
    else:
        parts.append(_counts_of_part(whole(others[0]).to_local(), rows.shape[0], spread))
    out = DTensor.from_local(call(*parts), spread, [placement], run_check=False, shape=rows.shape, stride=_contiguous(rows.shape))
    return out if cut else out.redistribute(placements=[Replicate()])


def _as_dtensor(tensor: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    return tensor if isinstance(tensor, DTensor) else DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)


def _part(tensor: DTensor, placement: Placement) -> torch.Tensor:
    if tensor.placements[0] != placement:
        tensor = whole(tensor).redistribute(placements=[placement])
    return tensor.to_local(grad_placements=[placement])


def _counts_of_part(counts: torch.Tensor, rows: int, mesh: DeviceMesh) -> torch.Tensor:
    """How many rows of each expert are in this rank's part of the sorted rows: as torch.chunk cuts."""
    chunk = -(-rows // mesh.size())
    low = min(mesh.get_local_rank() * chunk, rows)
    ends = counts.cumsum(0)
    starts = ends - counts
    high = min(low + chunk, rows)
    return (ends.clamp(low, high) - starts.clamp(low, high)).to(counts.dtype)


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


class Way(NamedTuple):
    """Where the rows of one call go: how many to each rank of the group, and how many come from each."""

    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup
    gain: float
    """What the gradients of rows are multiplied with, as long as these are with the experts."""


@dataclass(frozen=True)
class Dealt:
    """A module of experts, of which this rank has a share."""

    module: nn.Module
    forward: Callable[..., torch.Tensor]
    """The module's own."""
    experts: Experts
    ep: DeviceMesh
    gain: float

    @property
    def share(self) -> int:
        return self.experts.number // self.ep.size()

    def chosen(self, rows: torch.Tensor, choice: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The module's result, where it is called with the experts that each token chose; weights stay with the tokens."""
        if rows.is_meta:
            return rows.clone()
        tokens, k = choice.shape
        flat = choice.flatten()
        order = flat.argsort(stable=True)
        counts = flat.new_zeros(self.experts.number, dtype=torch.int64).scatter_add(0, flat.long(), torch.ones_like(flat).long())
        out = self._away(_Copied.apply(rows, order, k), counts, self._numbered)
        out = _permuted(out, inverse(order)).view(tokens, k, *rows.shape[1:])
        return (out * weights.unsqueeze(-1)).sum(1).to(rows.dtype)

    def sorted(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The module's result, where it is called with rows in the order of their experts."""
        if rows.is_meta:
            return rows.clone()

        def run(received: torch.Tensor, numbers: torch.Tensor, of_each: torch.Tensor) -> torch.Tensor:
            order = numbers.argsort(stable=True)
            out = self.forward(_permuted(received, order), of_each.to(counts.dtype))
            return _permuted(out, inverse(order))

        return self._away(rows, counts.long(), run)

    def _numbered(self, rows: torch.Tensor, numbers: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return self.forward(rows, numbers.unsqueeze(1), rows.new_ones(len(rows), 1))

    def _away(self, rows: torch.Tensor, counts: torch.Tensor, run: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The results of `rows`, which are in the order of their experts: `run(rows, numbers, counts)` on the rank of each."""
        way, of_each = self._way(len(rows), counts)
        received = _Send.apply(rows, way)
        experts = torch.arange(self.share, device=rows.device).repeat(self.ep.size())
        numbers = experts.repeat_interleave(of_each.flatten(), output_size=len(received))
        with self._as_a_share() as parameters:
            out = run(received, numbers, of_each.sum(0))
            if not len(received):
                out = _Nothing.apply(out, received, *parameters)
        back = Way(way.received, way.sent, way.group, 1 / way.gain)
        found: torch.Tensor = _Send.apply(out, back)
        return found

    def _way(self, rows: int, counts: torch.Tensor) -> tuple[Way, torch.Tensor]:
        """Where rows go, and how many come from each rank for each of this rank's experts."""
        group, size = self.ep.get_group(), self.ep.size()
        received = all_to_all(counts, None, None, group)
        of_each = received.view(size, self.share)
        if dist.get_backend(group) == "fake":
            sent = _evenly(rows, size)
            came = [sent[self.ep.get_local_rank()]] * size
            of_each = counts.new_tensor([_evenly(number, self.share) for number in came])
        else:
            sent, came = torch.stack([counts.view(size, -1).sum(1), of_each.sum(1)]).tolist()
        return Way(sent, came, group, 1 / self.gain), of_each

    @contextmanager
    def _as_a_share(self) -> Iterator[list[torch.Tensor]]:
        """The module as one of fewer experts with plain parameters, which are given too."""
        tables: list[dict[str, Any]] = [part._parameters for part in self.module.modules()]
        held = [(table, name, parameter) for table in tables for name, parameter in table.items() if parameter is not None]
        told = [name for name, value in vars(self.module).items() if "expert" in name and value == self.experts.number]
        locals_ = [parameter.to_local() for _, _, parameter in held]
        try:
            for (table, name, _), local in zip(held, locals_, strict=True):
                table[name] = local
            vars(self.module).update(dict.fromkeys(told, self.share))
            yield locals_
        finally:
            for table, name, parameter in held:
                table[name] = parameter
            vars(self.module).update(dict.fromkeys(told, self.experts.number))


def _evenly(number: int, parts: int) -> list[int]:
    return [number // parts + (i < number % parts) for i in range(parts)]


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _permuted(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _Copied.apply(rows, order, 1)
    return found


class _Copied(torch.autograd.Function):
    """Every row `k` times, in some order. (Indexing would add up the gradients one by one, in no certain order.)"""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
        ctx.k = k
        ctx.save_for_backward(order)
        return rows.index_select(0, order // k if k > 1 else order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (order,) = ctx.saved_tensors
        gradient = gradient.index_select(0, inverse(order))
        if ctx.k > 1:
            gradient = gradient.view(-1, ctx.k, *gradient.shape[1:]).sum(1)
        return gradient, None, None


class _Send(torch.autograd.Function):
    """Rows to the ranks of a group; gradients the same way back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, way: Way) -> torch.Tensor:
        ctx.way = way
        return _send(rows, way.sent, way.received, way.group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        way: Way = ctx.way
        gradient = _send(gradient, way.received, way.sent, way.group)
        return gradient.mul_(way.gain) if way.gain != 1 else gradient, None


def _send(rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    return all_to_all(rows.contiguous(), received, sent, group)


class _Nothing(torch.autograd.Function):
    """No rows came, so that no operation may have met rows or parameters; they have gradients, as on every other rank."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in others]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradient, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
