"""Which part of a parameter a rank holds: tensor parallel cuts first, FSDP cuts what is left; experts are dealt over ep in
tensor parallel's stead, and FSDP cuts them over efsdp.

The same arithmetic serves three verbs: to fill a shard from a full tensor, to name a shard's place in a checkpoint, and
to fill a full tensor from shards. A shard of a packed weight is several rectangles of the full tensor, hence *pieces*.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, product

import torch

from autoplan.strategy import Layout

Run = tuple[int, int]
"""(start, length) of consecutive indices of one dim."""


@dataclass(frozen=True, slots=True)
class Coordinate:
    """Where a rank stands on the two axes that cut parameters."""

    tp: int
    tp_size: int
    dp_shard: int
    dp_shard_size: int
    experts: Coordinate | None = None
    """On those that cut experts, ep and efsdp, where there are any."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of the full tensor, and where it lies in the local one."""

    offset: tuple[int, ...]
    local_offset: tuple[int, ...]
    sizes: tuple[int, ...]

    def of_full(self, tensor: torch.Tensor) -> torch.Tensor:
        return _narrow(tensor, self.offset, self.sizes)

    def of_local(self, tensor: torch.Tensor) -> torch.Tensor:
        return _narrow(tensor, self.local_offset, self.sizes)


@dataclass(frozen=True, slots=True)
class ParameterShards:
    """How one parameter is cut."""

    shape: tuple[int, ...]
    layout: Layout
    fsdp_dim: int
    dealt: bool = False
    """It is experts', dealt over ep: `layout` is over that axis."""

    def tp_shape(self, tp_size: int) -> tuple[int, ...]:
        """Shape of the part that one rank of the tp axis, or of ep, works with."""
        shape = list(self.shape)
        if self.layout.sharded:
            shape[self.layout.dim] //= tp_size
        return tuple(shape)

    def pieces(self, at: Coordinate) -> Iterator[Piece]:
        """The rectangles that the rank at `at` holds, none of them empty."""
        at = at.experts if self.dealt and at.experts is not None else at
        runs = [self._runs(dim, at) for dim in range(len(self.shape))]
        starts = [[0, *accumulate(length for _, length in dim_runs)] for dim_runs in runs]
        for choice in product(*(range(len(dim_runs)) for dim_runs in runs)):
            yield Piece(
                offset=tuple(runs[dim][i][0] for dim, i in enumerate(choice)),
                local_offset=tuple(starts[dim][i] for dim, i in enumerate(choice)),
                sizes=tuple(runs[dim][i][1] for dim, i in enumerate(choice)),
            )

    def _runs(self, dim: int, at: Coordinate) -> list[Run]:
        size = self.shape[dim]
        runs = [(0, size)]
        if self.layout.sharded and self.layout.dim == dim and at.tp_size > 1:
            part = size // self.layout.blocks
            share = part // at.tp_size
            runs = [(block * part + at.tp * share, share) for block in range(self.layout.blocks)]
        if dim == self.fsdp_dim:
            length = sum(run[1] for run in runs)
            chunk = -(-length // at.dp_shard_size)  # as torch.chunk cuts: the last ranks may get less, or nothing
            runs = _cut(runs, at.dp_shard * chunk, min((at.dp_shard + 1) * chunk, length))
        return runs


def _cut(runs: list[Run], begin: int, end: int) -> list[Run]:
    """What positions `begin` to `end` of the concatenated runs are."""
    kept, position = [], 0
    for start, length in runs:
        low, high = max(begin, position), min(end, position + length)
        if low < high:
            kept.append((start + low - position, high - low))
        position += length
    return kept


def _narrow(tensor: torch.Tensor, offset: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(offset, sizes, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
