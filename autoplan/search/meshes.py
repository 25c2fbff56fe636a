"""The meshes that are searched, and what they can run.

Where cp and the micro-batch have a common divisor `d` there is a better mesh: cp / d, micro-batch / d, and dp_shard times d.
There a device has as many tokens in as many micro-batches, its parameters are cut over the same devices, and of the sequence it
sends what d times fewer devices exchange. So of cp only those micro-batches are searched that share no divisor with it, if the
better mesh is one of those that may be chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from math import gcd
from typing import get_args

from autoplan.constraints import Constraints
from autoplan.cost.model import CostModel
from autoplan.plan import Candidate
from autoplan.schedule import ScheduleKind
from autoplan.search.space import (
    divisors,
    indivisible,
    legal,
    meshes,
    micro_batches,
    schedules,
    uncompiled,
    unscheduled,
    unstageable,
)
from autoplan.strategy import CP_KINDS, Mesh, Within


def with_less_cp(mesh: Mesh, micro_batch: int) -> tuple[Mesh, int]:
    """The mesh and micro-batch that are better, if they are others: see the module."""
    shared = gcd(mesh.cp, micro_batch)
    cp, dp_shard = mesh.cp // shared, mesh.dp_shard * shared
    kind = mesh.cp_kind if cp > 1 else Mesh().cp_kind
    return replace(mesh, dp_shard=dp_shard, cp=cp, cp_kind=kind), micro_batch // shared


class Meshes:
    """All that the constraints and the model allow, and what is told of those that it doesn't. `every`: also where another mesh
    is known to be better."""

    def __init__(
        self, costs: CostModel, gpus: int, fixed: Mapping[str, int], constraints: Constraints, *, every: bool = False
    ) -> None:
        self.costs, self.constraints = costs, constraints
        self.by_depth: dict[tuple[Within, int], list[Mesh]] = {}
        """By (tp, cp and ep; pp). Of a list all can run the same micro-batches, since all have as many data-parallel groups."""
        self.gpus, self.fixed = gpus, fixed
        self.refused: list[Candidate] = []
        found, apart = legal(gpus, fixed, constraints, costs)
        for mesh in found:
            refused = unstageable(mesh, costs.graph, costs.outer.order)
            if refused is None and not micro_batches(mesh, costs.workload):
                refused = indivisible(mesh, costs.workload)
            if refused is not None:
                self.refused.append(refused)
            elif self._allowed_sizes(mesh):
                self.by_depth.setdefault((mesh.within, mesh.pp), []).append(mesh)
        self.refused += apart  # those above came further
        self._possible = {mesh for some in self.by_depth.values() for mesh in some}
        self.beaten = set() if every else {(mesh, size) for mesh in self._possible for size in self._beaten_sizes(mesh)}
        """Meshes with micro-batches that another one of these does better."""
        self.sizes, self.depths = cache(self._sizes), cache(self._depths)

    def _allowed_sizes(self, mesh: Mesh) -> list[int]:
        sizes = micro_batches(mesh, self.costs.workload)
        return [size for size in sizes if self.constraints.allows("micro_batch", size)]

    def _beaten_sizes(self, mesh: Mesh) -> Iterator[int]:
        for size in self._allowed_sizes(mesh) if mesh.cp > 1 else ():
            other, smaller = with_less_cp(mesh, size)
            if other != mesh and other in self._possible and self.constraints.allows("micro_batch", smaller):
                yield size

    def _sizes(self, within: Within, pp: int | None = None) -> list[int]:
        """Micro-batches that some mesh of this tp, cp and ep (and pp) can run, unless all are beaten."""
        some = [meshes for at, meshes in self.by_depth.items() if at[0] == within and pp in (None, at[1])]
        return sorted({size for meshes in some for size in self._allowed_sizes(meshes[0]) if not self._all_beaten(meshes, size)})

    def _all_beaten(self, meshes: Iterable[Mesh], size: int) -> bool:
        return bool(self.beaten) and all((mesh, size) in self.beaten for mesh in meshes)

    def _depths(self, within: Within, piped: bool, micro_batch: int | None = None) -> list[int]:
        """The numbers of stages, of pipelines or without one, with which some mesh can run a micro-batch, or any."""
        some = [pp for at, pp in self.by_depth if at == within and (pp > 1) == piped]
        return [pp for pp in some if micro_batch is None or micro_batch in self.sizes(within, pp)]

    def alike(self, mesh: Mesh, micro_batch: int) -> list[Mesh]:
        """All that can run a micro-batch and have the same tp, cp and ep, and a pipeline as well, or none."""
        depths = self.depths(mesh.within, mesh.pp > 1, micro_batch)
        return [each for pp in depths for each in self.by_depth[mesh.within, pp]]

    def ruled_out(self) -> Iterator[Candidate]:
        """Where the constraints leave nothing to search: what the model could run but for them, and why it isn't."""
        workload = self.costs.workload
        for mesh, size in ((some[0], size) for (within, pp), some in self.by_depth.items() for size in self.sizes(within, pp)):
            for kind in get_args(ScheduleKind):
                if self.constraints.allows("schedule", kind):
                    reason = unscheduled(kind, mesh, self.costs.micro_batches(mesh, size), self.costs)
                    if mesh.pp > 1 and reason:
                        yield _illegal(mesh, size, reason)
        found, _ = legal(self.gpus, self.fixed, self.constraints, self.costs)
        for mesh in sorted(found, key=lambda each: (each.dp, each)):
            if micro_batches(mesh, workload) and not self._allowed_sizes(mesh):
                asked = " or ".join(map(str, self.constraints.only.get("micro_batch", []))) or "what is left"
                share = f"the {workload.global_batch // mesh.dp} samples of a step"
                share += f" of each of {mesh.dp} data-parallel groups" if mesh.dp > 1 else ""
                yield _illegal(mesh, 1, f"a micro-batch of {asked} does not divide {share}")
        if not found:
            cut = [mesh for mesh in meshes(self.gpus, self.fixed, divisors(self.gpus)) if mesh.cp > 1]
            for mesh, kind in ((mesh, kind) for mesh in cut for kind in CP_KINDS if self.constraints.allows("cp_kind", kind)):
                if reason := uncompiled(mesh, workload) or self.costs.context.refusal(mesh.cp, mesh.tp, kind):
                    yield _illegal(mesh, 1, reason)

    def schedules(self, mesh: Mesh, micro_batch: int) -> list[tuple[ScheduleKind, int]]:
        """Those that may be used, with their chunks."""
        found = schedules(mesh, self.costs.micro_batches(mesh, micro_batch), self.costs)
        return [each for each in found if mesh.pp == 1 or self.constraints.allows("schedule", each[0])]


def _illegal(mesh: Mesh, micro_batch: int, reason: str) -> Candidate:
    return Candidate(mesh=mesh, micro_batch=micro_batch, status="illegal", reason=reason)
