"""What the branch and bound of `search.tree` splits, from all meshes of a kind down to one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoplan.schedule import ScheduleKind
from autoplan.search.columns import Priced, Tables
from autoplan.search.stages import Staging
from autoplan.strategy import Layout, Within
from autoplan.units import Bytes


@dataclass(frozen=True)
class Family:
    """All meshes and micro-batches of one size of tp, cp and ep, and stream layout, with a pipeline or without."""

    within: Within
    stream: Layout
    piped: bool


@dataclass(frozen=True)
class Group:
    """... of one micro-batch."""

    within: Within
    stream: Layout
    piped: bool
    micro_batch: int


@dataclass(frozen=True)
class Depth:
    """... of one number of stages."""

    within: Within
    stream: Layout
    micro_batch: int
    pp: int


@dataclass(frozen=True)
class Shape:
    """... of one number of stages and one schedule."""

    within: Within
    stream: Layout
    micro_batch: int
    pp: int
    schedule: ScheduleKind
    chunks: int


@dataclass(frozen=True)
class Unsettled:
    """A staging with the best of all outer strategies in every part: none with one of them is better."""

    staging: Staging


@dataclass(frozen=True)
class Bounded:
    """A staging whose bound has memory in it."""

    staging: Staging


Several = Family | Group | Depth | Shape
"""Several meshes."""
Node = Several | Unsettled | Staging | Bounded


def staging_of(node: Unsettled | Staging | Bounded) -> Staging:
    """The staging that it is, or is about."""
    return node if isinstance(node, Staging) else node.staging


class AnySchedule(Staging):
    """No schedule of some is better: it has the bubble and the p2p of the best, and in flight as little as 1f1b."""

    def __init__(self, tables: Tables, priced: Priced, schedules: Sequence[tuple[ScheduleKind, int]], limit: Bytes) -> None:
        super().__init__(tables, priced, next(iter(priced.outers), None), "1f1b", 1, limit)
        costs, mesh, size = tables.costs, priced.mesh, priced.micro_batch
        self.few = min(costs.share(schedule, chunks, mesh, size) for schedule, chunks in schedules)
        self.many = self.micro_batches - self.few
        self.hops = min(costs.hops(schedule, chunks, mesh, size, priced.stream) for schedule, chunks in schedules)
