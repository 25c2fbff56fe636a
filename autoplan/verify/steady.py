"""How few micro-batches show what a step of many does.

A rank repeats itself: every micro-batch (under an interleaved schedule every `pp` of them) is one forward and one backward pass
of each of its stages, with the same gathers, reductions and sends. So for two numbers of micro-batches `a < b` that are whole
repetitions apart,

    sent(m) = sent(b) + (m - b) / (b - a) * (sent(b) - sent(a))       of each collective: number and bytes

Once a pipeline is full no more is held at `m` than at `b`, but for scalars (each micro-batch's loss): the most micro-batches in
flight, by the schedule's own order, are the same. Under gpipe all micro-batches are in flight at once, so there all are run.

Without a pipeline one step of two micro-batches is enough: what is sent between two moments that are alike, the beginnings of
both, when all is gathered that is gathered once a step, is what one micro-batch more would send. A step that has but one
micro-batch is run as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from autoplan.plan import Plan, zero_level
from autoplan.schedule import in_flight_by_chunk
from autoplan.verify.traffic import Amount, Traffic, total

ACCUMULATES = 2
"""Micro-batches from which on gradients are added to others, some in another format than that of a single one."""


@dataclass(frozen=True)
class Sample:
    """The numbers of micro-batches of the two steps that show it, the fewer first."""

    counts: tuple[int, int]
    all: int
    one_after_another: bool = False
    """Whether each micro-batch has ended when the next begins."""

    @property
    def runs(self) -> tuple[int, ...]:
        """Of the steps to run."""
        return self.counts[-1:] if self.one_after_another or self.counts[-1] == self.all else self.counts

    @property
    def parted(self) -> bool:
        """Whether the one step that is run is to be parted into two."""
        return self.one_after_another and self.counts[-1] < self.all

    def continued(self, seen: Mapping[int, Traffic]) -> Traffic:
        """What all micro-batches send, from what those that were run sent."""
        most = seen[self.counts[-1]]
        if self.counts[-1] == self.all:
            return most
        fewer, apart = seen[self.counts[0]], self.counts[-1] - self.counts[0]
        more = self.all - self.counts[-1]
        return total((key, _on(amount, fewer.get(key, Amount()), more, apart)) for key, amount in most.items())


def _on(amount: Amount, fewer: Amount, more: int, apart: int) -> Amount:
    count, size = amount.count - fewer.count, amount.bytes - fewer.bytes
    return amount + Amount(count * more // apart, size * more // apart)


def sample_of(plan: Plan, rank: int) -> Sample:
    """What to run of `plan` on pipeline rank `rank`."""
    count, pipeline = plan.micro_batches, plan.pipeline
    if pipeline is None:
        return Sample((1, min(2, count)), count, one_after_another=True)
    period = plan.mesh.pp if pipeline.chunks > 1 else 1
    full = max(in_flight_by_chunk(pipeline.schedule, rank, plan.mesh.pp, count, pipeline.chunks))
    alike = _alike_from(plan)
    if pipeline.schedule == "zero-bubble":
        full = alike = min(plan.mesh.pp, count)  # as many wait for gradients of weights as are not in flight any more
    full = -(-full // period) * period
    first = period * -(-alike // period)
    most = count if pipeline.schedule == "gpipe" else max(full, first) + period
    return Sample((min(first, count), min(most, count)), count)


def _alike_from(plan: Plan) -> int:
    """From how many micro-batches on each sends the same."""
    added = plan.mesh.tp > 1 and any(zero_level(each.zero, plan.mesh, plan.workload) == 1 for _, each in plan.strategies)
    return ACCUMULATES if added else 1  # (`verify.expected`: a GATHERED parameter's gradient)


def told(samples: Collection[Sample]) -> str:
    """In words; "" where all micro-batches were run."""
    fewer = [sample for sample in samples if sample.counts[-1] < sample.all]
    if not fewer:
        return ""
    first, last = (max(sample.counts[step] for sample in fewer) for step in (0, 1))
    if fewer[0].parted:
        return f"a step of {last} micro-batches was run; what {fewer[0].all} send follows from it"
    most = "at most " if len({sample.counts for sample in samples}) > 1 else ""
    return f"steps of {most}{first} and {last} micro-batches were run; what {fewer[0].all} send follows from them"
