"""The corner of a layer's Pareto set: in every cost as good as the sharding that is best in that one.

No sharding is as good in all of them at once, so that only bounds come of it; but it costs one pass over the lattice with a
number per state and cost, where the Pareto set carries along every label that nothing beats (`search.shardings`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from math import inf

import numpy as np

from autoplan.cost.layer import LayerCost
from autoplan.cost.parameters import LocalParameter, Sizes, sizes
from autoplan.cost.prices import LayerModel
from autoplan.cost.selective import Kept
from autoplan.search.dominance import Floats
from autoplan.search.labels import LABELS, PEAK, SAVED, additions
from autoplan.search.lattice import Lattice
from autoplan.strategy import REPLICATE
from autoplan.units import Bytes, Seconds


class Corner:
    """See the module. `prices` and `kept()`: as `search.shardings.Ways` has them, by level [choices, 7] and [choices, 3]."""

    def __init__(
        self, model: LayerModel, lattice: Lattice, prices: Sequence[Floats], kept: Callable[[], Sequence[Floats]]
    ) -> None:
        self.model, self.lattice, self.prices, self._kept = model, lattice, prices, kept

    @cached_property
    def seconds(self) -> Seconds | None:
        """Forward and backward of the fastest sharding; None when there is no way through the lattice."""
        seconds = np.zeros(1)
        for level, price in zip(self.lattice.levels, self.prices, strict=True):
            if not len(level.first):
                return None
            added = (price[:, 0] + price[:, 1])[level.choice]
            seconds = seconds + added if level.straight else np.minimum.reduceat(seconds[level.source] + added, level.first)
        leaving = seconds[self.lattice.leaves]
        return float(leaving.min()) if len(leaving) else None

    @cached_property
    def cost(self) -> LayerCost:
        """Its forward pass is the fastest alone, and so are both together. To be asked where there is a way through."""
        assert self.seconds is not None
        forward, _, saved, _, rerun, besides, beneath = self._least
        results, more, again = self._least_kept
        both = max(self.seconds, forward)
        kept, batch = Kept(results, more + results, again), self.model.batch
        sizes = (saved, self._inputs, besides + saved, (), self.model.buffers)
        return LayerCost(forward, both - forward, 0.0, 0.0, *sizes, kept=kept, rerun=rerun, beneath=beneath, batch=batch)

    def sizes(self, dealt: bool, shards: int) -> Sizes:
        """See `cost.data_parallel.HasParameters`; FSDP cuts them as evenly as they go."""
        if dealt:
            return sizes(self._dealt, dealt, shards)
        frozen = sum(p.numel for p in self.lattice.body.parameters if not p.buffer and not p.trainable)
        trainable = self._least[3] - sizes(self._dealt, True, 1).trainable
        return Sizes((trainable + frozen) / shards, trainable / shards)

    @cached_property
    def _dealt(self) -> Sequence[LocalParameter]:
        local = (self.model.local_parameter(p, REPLICATE) for p in self.lattice.body.parameters if not p.buffer)
        return tuple(p for p in local if p.dealt)

    @cached_property
    def _inputs(self) -> Bytes:
        """What is kept of a layer that is recomputed: of every tensor that it is called with, the smallest form."""
        ops, body = self.lattice.body.ops, self.lattice.body
        least: dict[int, Bytes] = {}
        for number, target in self.lattice.entrances:
            level, value = self.lattice.levels[number], body.values[target]
            source = ops[level.operation].inputs[0]
            forms = [self.model.local_bytes(value, choice.outcome.outputs[0]) for choice in level.choices]
            least[source] = min(least.get(source, inf), *forms) if value.requires_grad else 0.0
        return sum(least.values())

    @cached_property
    def _least(self) -> tuple[float, ...]:
        """The least of every number of a label; in the peak's place, of what it has besides the saved bytes. (The least peak less
        the least saved bytes may be of two shardings, and bounds nothing.)"""
        costs, besides = np.zeros((LABELS, 1)), np.zeros(1)
        for level, added in zip(self.lattice.levels, additions(self.lattice, self.prices, self.model), strict=True):
            costs = added.to(costs[:, level.source], np.arange(len(level.source)))
            besides = np.maximum(besides[level.source] - added.sums[SAVED], added.besides) + added.made
            if not level.straight:
                costs, besides = (np.minimum.reduceat(each, level.first, axis=-1) for each in (costs, besides))
        costs[PEAK] = besides
        return tuple(costs[:, self.lattice.leaves].min(axis=1).tolist())

    @cached_property
    def _least_kept(self) -> tuple[float, ...]:
        """Under selective recomputation the least of what is kept, of what is there besides what the layer would have saved, and
        of the seconds of what runs again."""
        costs = np.zeros((3, 1))
        for level, kept in zip(self.lattice.levels, self._kept(), strict=True):
            added = kept[level.choice].T
            added[1] -= added[0]
            costs = costs + added if level.straight else np.minimum.reduceat(costs[:, level.source] + added, level.first, axis=1)
        return tuple(costs[:, self.lattice.leaves].min(axis=1).tolist())
