"""The meshes that are searched, and what they can run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from autoplan.constraints import Constraints
from autoplan.cost.model import CostModel
from autoplan.schedule import ScheduleKind
from autoplan.search.space import indivisible, legal, micro_batches, schedules, unstageable
from autoplan.strategy import Mesh, Within


class Meshes:
    """All that the constraints and the model allow, and what is told of those that it doesn't."""

    def __init__(self, costs: CostModel, gpus: int, fixed: Mapping[str, int], constraints: Constraints) -> None:
        self.costs, self.constraints = costs, constraints
        self.by_depth: dict[tuple[Within, int], list[Mesh]] = {}
        """By (tp, cp and ep; pp). Of a list all can run the same micro-batches, since all have as many data-parallel groups."""
        found, self.refused = legal(gpus, fixed, constraints, costs.context, costs.mixtures)
        for mesh in found:
            refused = unstageable(mesh, costs.graph, costs.outer.order)
            if refused is None and not micro_batches(mesh, costs.workload):
                refused = indivisible(mesh, costs.workload)
            if refused is not None:
                self.refused.append(refused)
            elif self._allowed_sizes(mesh):
                self.by_depth.setdefault((mesh.within, mesh.pp), []).append(mesh)
        self.sizes, self.depths = cache(self._sizes), cache(self._depths)

    def _allowed_sizes(self, mesh: Mesh) -> list[int]:
        sizes = micro_batches(mesh, self.costs.workload)
        return [size for size in sizes if self.constraints.allows("micro_batch", size)]

    def _sizes(self, within: Within, pp: int | None = None) -> list[int]:
        """Micro-batches that some mesh of this tp, cp and ep (and pp) can run."""
        some = [meshes[0] for at, meshes in self.by_depth.items() if at[0] == within and pp in (None, at[1])]
        return sorted({size for mesh in some for size in self._allowed_sizes(mesh)})

    def _depths(self, within: Within, piped: bool, micro_batch: int | None = None) -> list[int]:
        """The numbers of stages, of pipelines or without one, with which some mesh can run a micro-batch, or any."""
        some = [pp for at, pp in self.by_depth if at == within and (pp > 1) == piped]
        return [pp for pp in some if micro_batch is None or micro_batch in self.sizes(within, pp)]

    def alike(self, mesh: Mesh, micro_batch: int) -> list[Mesh]:
        """All that can run a micro-batch and have the same tp, cp and ep, and a pipeline as well, or none."""
        depths = self.depths(mesh.within, mesh.pp > 1, micro_batch)
        return [each for pp in depths for each in self.by_depth[mesh.within, pp]]

    def schedules(self, mesh: Mesh, micro_batch: int) -> list[tuple[ScheduleKind, int]]:
        """Those that may be used, with their chunks."""
        found = schedules(mesh, self.costs.micro_batches(mesh, micro_batch), self.costs.graph)
        return [each for each in found if mesh.pp == 1 or self.constraints.allows("schedule", each[0])]
