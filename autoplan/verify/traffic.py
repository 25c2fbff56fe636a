"""What is sent in a step: collectives by axis of the mesh and kind, how many and how large; and a mode that counts them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from autoplan.strategy import AXES, Mesh
from autoplan.units import Bytes

CollectiveKind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send", "recv"]
KINDS: tuple[CollectiveKind, ...] = get_args(CollectiveKind)

Key = tuple[str, str]
"""(axis of the mesh, kind of collective)"""


@dataclass(frozen=True, slots=True)
class Amount:
    """How often, and how many bytes in all. A collective counts with its whole tensor: what an all_gather makes, what a
    reduce_scatter or all_reduce is given, what is sent or received."""

    count: int = 0
    bytes: Bytes = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.count + other.count, self.bytes + other.bytes)

    def times(self, number: int) -> Amount:
        return Amount(self.count * number, self.bytes * number)


Traffic = Mapping[Key, Amount]


def total(parts: Iterable[tuple[Key, Amount]]) -> Traffic:
    """The sums, in the order of the axes and kinds; what does not happen is left out."""
    found: dict[Key, Amount] = defaultdict(Amount)
    for key, amount in parts:
        found[key] += amount
    axes = [*AXES, *sorted({axis for axis, _ in found} - set(AXES))]
    order = sorted(found, key=lambda key: (axes.index(key[0]), KINDS.index(key[1])))
    return {key: found[key] for key in order if found[key].count}


def coordinates(rank: int, mesh: Mesh) -> dict[str, int]:
    """Where a rank stands on every axis."""
    found = {}
    for axis in reversed(AXES):
        rank, found[axis] = divmod(rank, getattr(mesh, axis))
    return found


def axis_of(ranks: Iterable[int], mesh: Mesh) -> str:
    """The axis along which `ranks` lie; several joined by "+" for a group over more than one."""
    at = [coordinates(rank, mesh) for rank in ranks]
    return "+".join(axis for axis in AXES if len({each[axis] for each in at}) > 1)
