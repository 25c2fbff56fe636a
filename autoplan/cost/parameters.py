"""Parameters as one device has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

from autoplan.strategy import expert_cut


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """A parameter's piece on one tp rank: `shape` is local, `fsdp_dim` the dim that FSDP cuts further."""

    name: str
    shape: tuple[int, ...]
    fsdp_dim: int
    trainable: bool
    dealt: bool = False
    """Over ep: FSDP cuts what one device has of the experts over `Mesh.efsdp`, along `expert_cut`."""

    def cut(self, shards: int) -> int:
        """The dim along which FSDP cuts it over so many ranks."""
        return expert_cut(self.shape, shards) if self.dealt else self.fsdp_dim

    def numel(self, shards: int) -> int:
        """Elements on the fullest of `shards` ranks (FSDP cuts into equal chunks, the last ones shorter or empty)."""
        if not self.shape:
            return 1
        dim = self.cut(shards)
        return ceil(self.shape[dim] / shards) * prod(self.shape) // max(self.shape[dim], 1)


class Sizes(NamedTuple):
    """Elements of some parameters on one rank; `trainable` ones among them."""

    numel: float
    trainable: float


def sizes(parameters: Sequence[LocalParameter], dealt: bool, shards: int) -> Sizes:
    """Of those that are dealt over ep or those that are not, on the fullest of `shards` ranks that FSDP cuts them over."""
    every = [(p.numel(shards), p.trainable) for p in parameters if p.dealt == dealt]
    return Sizes(sum(n for n, _ in every), sum(n for n, trainable in every if trainable))
