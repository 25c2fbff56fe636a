"""A bound for many meshes at once: what a class of layers takes at least, with what FSDP must send at least.

Of a layer with the seconds `c` of both its passes, the gathering `g`, reduction `r` and final all_reduce `a` of its parameters on
a mesh, no sharding takes less than (notation and ZeRO levels of cost.step)

    zero   every micro-batch         once a step, besides
    3      c + e(c, 2 g + r)
    2      c + e(c, g + r)
    1      c                         e(c, g + r + a)

where `c`, and what `g`, `r` and `a` send, are those of the corner of all shardings (search.corner) for a large micro-batch, of
which a smaller one takes its share at least, of seconds and of bytes (`share_of`). For `c + e(c, q) = max(c, q) +
overlap min(c, q)` never falls when either grows; and the passes, each for itself under what it hides, take no less than both
together: the larger ones of two pairs add up to no less than the larger sum. What is added up, copied and recomputed stands in
`c`, since e falls by no more than `c` rises; under level 1 it is copied once, and counted so.

A `Rough` has one column for every mesh, ZeRO level and recomputation, so that a mix of them bounds every one of the meshes. Their
bytes are those of the mesh (`cost.step.layer_step`), of the corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from autoplan.cost.data_parallel import DataParallel
from autoplan.cost.layer import LayerCost
from autoplan.cost.model import CostModel
from autoplan.cost.step import LayerStep, beside, layer_step
from autoplan.search.options import Column, Columns, Costs
from autoplan.strategy import Layout, Recompute, Sharding, Strategy, Zero
from autoplan.units import Seconds


class Rough:
    """A class of layers on many meshes. See the module."""

    def __init__(
        self, cost: LayerCost, stream: Layout, sent: Sequence[DataParallel], micro_batches: int,
        ways: Sequence[tuple[Recompute, Zero]], costs: CostModel, *, outer: bool, pipelined: bool,
    ) -> None:  # fmt: skip
        """`cost`: of the corner's share; `sent`: what its parameters cost on the dp axes of every mesh; `micro_batches`: at
        least."""
        self.stream, self.sent, self.ways = stream, sent, ways
        self._step = partial(
            layer_step, cost, micro_batches=micro_batches, hardware=costs.hardware, load=costs.workload, outer=outer,
            pipelined=pipelined,
        )  # fmt: skip
        every = DataParallel._make(np.array(numbers) for numbers in zip(*sent, strict=True))
        silent = every._replace(gather=0.0, reduce=0.0, final=0.0)
        blocks = []
        for again, zero in ways:
            found = Costs.of(self._step(dp=silent, zero=zero, again=again))
            cover = 0.0 if outer else found.slot_seconds + (every.unpack + every.pack if zero == 1 else 0.0)
            often, once = (beside(cover, seconds, costs.hardware)[0] for seconds in _sent(every, zero))
            found = found._replace(slot_seconds=found.slot_seconds + often, once_seconds=found.once_seconds + once)
            blocks.append(found.columns(len(sent)))
        self._numbers = np.stack(blocks, axis=2)
        """By cost, mesh and way."""

    def columns(self, meshes: Sequence[int]) -> Columns:
        """Of some of the meshes alone, by their numbers."""
        numbers = self._numbers[:, meshes].reshape(len(Costs._fields), -1)

        def column(number: int) -> Column:
            (again, zero), dp = self.ways[number % len(self.ways)], self.sent[meshes[number // len(self.ways)]]

            def price(_: Strategy) -> LayerStep:
                return self._step(dp=dp, zero=zero, again=again)

            return Column(Costs._make(numbers[:, number].tolist()), again, zero, lambda: Sharding(stream=self.stream), price)

        return Columns(numbers, column)


def share_of(cost: LayerCost, share: float) -> LayerCost:
    """What a part of the micro-batch takes at least: a sample is never dearer in a larger one."""
    results, spare, again = cost.kept
    kept = cost.kept._replace(results=results * share, spare=spare * share, again=again * share)
    names = ("forward", "backward", "tp_forward", "tp_backward", "rerun", "saved", "inputs", "peak", "beneath", "batch")
    return replace(cost, kept=kept, **{name: getattr(cost, name) * share for name in names})


def _sent(dp: DataParallel, zero: Zero) -> tuple[Seconds, Seconds]:
    """Seconds of what is sent every micro-batch, and once a step."""
    if zero == 1:
        return 0.0 * dp.gather, dp.gather + dp.reduce + dp.final
    return (2.0 if zero == 3 else 1.0) * dp.gather + dp.reduce, 0.0 * dp.gather
