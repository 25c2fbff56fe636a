"""Why a mesh and micro-batch was given up: how slow it is at least under the memory limit, or that it does not fit.

The search drops most of what it looks at by the first bound that suffices. What is told is worth more work, of the few that are
listed: the bound with memory in it that costs little, and where that does not tell, of the first `BOUNDED`, the one in whole
layers.
"""

from __future__ import annotations

from math import inf

from autoplan.plan import Candidate
from autoplan.search.candidates import slower, told, too_big
from autoplan.search.stages import Staging
from autoplan.strategy import Mesh
from autoplan.units import Bytes, Seconds

BOUNDED = 16
"""Stagings that are bounded in whole layers, which with several chunks a rank takes long."""

Covered = dict[tuple[Mesh, int], list[Staging]]
"""By what a mesh and micro-batch was proven to be no better than what was known."""


class GivenUp:
    """See the module. `best` is the step of the plan."""

    def __init__(self, covered: Covered, best: Seconds, limit: Bytes) -> None:
        self.covered, self.best, self.limit, self.left = covered, best, limit, BOUNDED
        self._bounds: dict[int, Seconds] = {}

    def verdict(self, staging: Staging) -> Candidate:
        """Of the mesh and micro-batch that a staging is of, by all that cover it."""
        key = staging.priced.mesh, staging.priced.micro_batch
        seconds = self.least(*key)
        if seconds == inf or not any(each.fits for each in self.covered[key]):
            return too_big(min(self.covered[key], key=lambda each: each.least_memory), self.limit)
        return told(slower(staging, seconds, bound=True), self.best)

    def least(self, mesh: Mesh, micro_batch: int) -> Seconds:
        """No plan of those that were given up is faster; infinite when there are none, or none fits."""
        return min((self._bound(each) for each in self.covered.get((mesh, micro_batch), ())), default=inf)

    def _bound(self, staging: Staging) -> Seconds:
        if id(staging) not in self._bounds:
            found = staging.early_bound
            if found <= self.best and self.left and staging.ranks > 1 and staging.chunks == 1:
                self.left -= 1
                found = max(found, staging.bound())
            self._bounds[id(staging)] = max(self.best, found)
        return self._bounds[id(staging)]
