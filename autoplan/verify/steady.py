"""How few micro-batches show what a step of many does.

Once a pipeline is full, a rank repeats itself: every micro-batch (under an interleaved schedule every `pp` of them) is one
forward and one backward pass of each of its stages, with the same gathers, reductions and sends. So for two numbers of
micro-batches `a < b` that are whole repetitions apart, and both fill the pipeline,

    sent(m) = sent(b) + (m - b) / (b - a) * (sent(b) - sent(a))       of each collective: number and bytes

and no more is held at `m` than at `b`, but for scalars (each micro-batch's loss): the most micro-batches in flight, by the
schedule's own order, are the same. Under gpipe all micro-batches are in flight at once, so there all are run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autoplan.plan import Plan
from autoplan.schedule import in_flight_by_chunk
from autoplan.verify.traffic import Amount, Traffic, total

ACCUMULATES = 2
"""Micro-batches from which on gradients are added to others."""


@dataclass(frozen=True)
class Sample:
    """The numbers of micro-batches of the two steps to run: the first makes the optimizer's states, and is the fewer."""

    counts: tuple[int, int]
    all: int

    def continued(self, seen: Mapping[int, Traffic]) -> Traffic:
        """What all micro-batches send, from what those that were run sent."""
        most = seen[self.counts[-1]]
        if self.counts[-1] == self.all:
            return most
        fewer, apart = seen[self.counts[0]], self.counts[-1] - self.counts[0]
        times = (self.all - self.counts[-1]) // apart
        each = {key: _less(amount, fewer.get(key, Amount())) for key, amount in most.items()}
        return total([*most.items(), *((key, amount.times(times)) for key, amount in each.items())])


def _less(one: Amount, other: Amount) -> Amount:
    return Amount(one.count - other.count, one.bytes - other.bytes)


def sample_of(plan: Plan, rank: int) -> Sample:
    """What to run of `plan` on pipeline rank `rank`."""
    count, pipeline = plan.micro_batches, plan.pipeline
    if pipeline is None:
        least, period = ACCUMULATES, 1
    elif pipeline.schedule == "gpipe":
        least, period = count, 1
    else:
        flying = in_flight_by_chunk(pipeline.schedule, rank, plan.mesh.pp, count, pipeline.chunks)
        period = plan.mesh.pp if pipeline.chunks > 1 else 1
        least = max(ACCUMULATES, *flying)
        least = -(-least // period) * period
    most = least + period
    return Sample((least, most) if most < count else (count, count), count)
