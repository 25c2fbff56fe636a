"""When every pipeline stage runs which micro-batch: gpipe, 1f1b, interleaved 1f1b and zero-bubble as an exact timeline.

`p` stages hold `v` chunks of layers each; chunk `c` of stage `s` is the virtual stage `k = c p + s`, so that a
micro-batch walks `k = 0 ... p v - 1` forward and back. A schedule is nothing but the *order* in which each stage runs its
work (`order`); the times then follow from the order, by the earliest start that keeps

    forward(k, i)   after forward(k - 1, i) + p2p        and after the work before it on its stage
    backward(k, i)  after backward(k + 1, i) + p2p       (the last one: after its own forward)

(`timeline`). Under zero-bubble (ZB-H1 of Qi et al., "Zero Bubble Pipeline Parallelism", 2023) a backward pass is two tasks: that
of inputs, which the stage before waits for, and that of weights, which comes after it, on stage `s` by `s` micro-batches.

For equal stages, `v = 1` and `p2p = 0` this gives the textbook (m + p - 1)(f + b) for gpipe and 1f1b; with
`v` chunks of f / v and b / v, interleaving waits only (p - 1)(f + b) / v. With b = i + w, of inputs and of weights, zero-bubble
waits (p - 1) max(f, i, f + i - w) if there are `p` micro-batches or more, else at most (p - 1)(f + i). No formula is known to us
for unequal stages.

Once warm, a schedule repeats itself every `2 p` micro-batches at most, so `pipeline_seconds` runs a timeline of less than
`(WARM + 2) p` micro-batches and continues it with its last slope, or the busiest stage's work if that is more: thousands of
micro-batches cost no more than a few dozen.

The search needs a price that is a sum. With `u_s` seconds of stage `s` for one micro-batch (all its chunks, both passes) and
`h` seconds of p2p,

    step = (m - q) max_s u_s + q sum_s u_s + hops h     q: what another stage adds, of its u_s: 1/v; under zero-bubble at least
                                                        its max(f, i, f + i - w) / u, for all stages the same (`filling`)
                                                        hops: 2 (p - 1) under gpipe, which hides the others; 2 (p v - 1)
                                                        interleaved; 2 (p - 1) (1 + (m - 1) / p) under 1f1b and zero-bubble,
                                                        which hides all but 4 (p - 1) of them if a hop is shorter than w / 2

(`additive_seconds`). For equal stages it is the timeline's own length, but for up to two hops under 1f1b, and more of them under
zero-bubble; for unequal ones, whose backward passes take alike so many times their forward passes, it is never less, for it lets
the slowest stage wait for the filling and draining of all others, some of which runs beside it.

Why an order and not a formula: what a picture draws, what a price says and what `torch.distributed.pipelining` runs are
the same list, and no formula holds for unequal stages with p2p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from autoplan.errors import UsageError
from autoplan.units import Seconds

ScheduleKind = Literal["gpipe", "1f1b", "interleaved-1f1b", "zero-bubble"]

WARM = 8
"""Multiples of the number of stages after which a pipeline is taken to repeat itself."""


class Task(NamedTuple):
    """One chunk of one micro-batch, forward or backward."""

    chunk: int
    micro_batch: int
    backward: bool
    weights: bool = False
    """Of a backward pass that is split: the gradients of weights; else those of inputs come with it."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A task and when it runs."""

    stage: int
    task: Task
    start: Seconds
    end: Seconds


@dataclass(frozen=True)
class Timeline:
    """What every stage does when: `stages[s]` in the order of time."""

    stages: tuple[tuple[Slot, ...], ...]

    @cached_property
    def seconds(self) -> Seconds:
        """From the first start to the last end."""
        return max((slot.end for slots in self.stages for slot in slots), default=0.0)

    @cached_property
    def idle(self) -> tuple[Seconds, ...]:
        """Of every stage: the bubble."""
        return tuple(self.seconds - sum(slot.end - slot.start for slot in slots) for slots in self.stages)


def order(kind: ScheduleKind, stage: int, stages: int, micro_batches: int, chunks: int = 1) -> list[Task]:
    """The tasks of one stage in the order in which it runs them. Raises `UsageError` where the schedule is not defined."""
    if kind == "gpipe":
        _single(kind, chunks)
        forward = [Task(0, i, False) for i in range(micro_batches)]
        return forward + [Task(0, i, True) for i in range(micro_batches)]
    if kind == "zero-bubble":
        _single(kind, chunks)
        return _split(stage, stages, micro_batches)
    if kind == "1f1b":
        _single(kind, chunks)
        ahead = min(stages - stage - 1, micro_batches)
        return _alternate(
            [Task(0, i, False) for i in range(micro_batches)], [Task(0, i, True) for i in range(micro_batches)], ahead
        )
    _whole(micro_batches, stages)
    groups = range(0, micro_batches, stages)
    forward = [Task(c, first + i, False) for first in groups for c in range(chunks) for i in range(stages)]
    backward = [Task(c, first + i, True) for first in groups for c in reversed(range(chunks)) for i in range(stages)]
    return _alternate(forward, backward, _ahead(stage, stages, chunks, len(forward)))


def _split(stage: int, stages: int, micro_batches: int) -> list[Task]:
    """As 1f1b; the gradients of weights follow those of inputs `stage` micro-batches later: they fill what there is to wait."""
    ahead = min(stages - stage - 1, micro_batches)
    tasks = [Task(0, i, False) for i in range(ahead)]
    for i in range(micro_batches):
        tasks += [Task(0, i + ahead, False)] if i + ahead < micro_batches else []
        tasks += [Task(0, i, True)]
        tasks += [Task(0, i - stage, True, True)] if i >= stage else []
    return tasks + [Task(0, i, True, True) for i in range(max(0, micro_batches - stage), micro_batches)]


def in_flight(kind: ScheduleKind, stage: int, stages: int, micro_batches: int, chunks: int = 1) -> int:
    """The most micro-batch chunks whose activations a stage holds at once: it follows from the order alone."""
    held = most = 0
    for task in order(kind, stage, stages, micro_batches, chunks):
        held += 0 if task.weights else -1 if task.backward else 1
        most = max(most, held)
    return most


@lru_cache(maxsize=4096)
def in_flight_by_chunk(kind: ScheduleKind, stage: int, stages: int, micro_batches: int, chunks: int = 1) -> tuple[int, ...]:
    """The most micro-batches whose activations each chunk of a stage holds at once."""
    if kind != "interleaved-1f1b":
        _single(kind, chunks)
        return (micro_batches if kind == "gpipe" else min(stages - stage, micro_batches),)
    _whole(micro_batches, stages)
    warm = min(micro_batches, WARM * stages + micro_batches % stages)
    turns, turn = -(-warm // stages), chunks * stages  # of every chunk as many micro-batches as there are stages
    ahead = _ahead(stage, stages, chunks, turns * turn)

    def freed(chunk: int, before: int) -> int:
        """Backward passes of a chunk among so many: they take the chunks in the opposite order."""
        whole, rest = divmod(max(0, before - ahead), turn)
        return whole * stages + min(max(0, rest - (chunks - 1 - chunk) * stages), stages)

    def most(chunk: int) -> int:
        """In each turn at its last forward pass, before each of which there was at most one backward pass."""
        return max((n + 1) * stages - freed(chunk, n * turn + (chunk + 1) * stages - 1) for n in range(turns))

    return tuple(most(chunk) for chunk in range(chunks))


def _ahead(stage: int, stages: int, chunks: int, tasks: int) -> int:
    """Forward passes before the first backward pass of interleaved 1f1b."""
    return min(2 * (stages - stage - 1) + (chunks - 1) * stages, tasks)


def _whole(micro_batches: int, stages: int) -> None:
    if micro_batches % stages:
        raise UsageError(f"interleaved 1f1b needs micro-batches ({micro_batches}) in multiples of its {stages} stages.")


def _single(kind: str, chunks: int) -> None:
    if chunks != 1:
        raise UsageError(f"{kind} has one chunk of layers a stage, not {chunks}.")


def _alternate(forward: list[Task], backward: list[Task], ahead: int) -> list[Task]:
    """`ahead` forwards, then one forward and one backward in turn, then the backwards that are left."""
    tasks = forward[:ahead]
    for next_forward, next_backward in zip(forward[ahead:], backward, strict=False):
        tasks += [next_forward, next_backward]
    return tasks + backward[len(forward) - ahead :]


def timeline(
    kind: ScheduleKind,
    forward: Sequence[Seconds],
    backward: Sequence[Seconds],
    micro_batches: int,
    p2p: Seconds = 0.0,
    chunks: int = 1,
    weights: Sequence[Seconds] = (),
) -> Timeline:
    """Run a schedule. `forward[k]` and `backward[k]` are the seconds of virtual stage `k`, `p2p` those of passing one
    micro-batch to the next stage; sending keeps nobody from computing. `weights[k]`: what of `backward[k]` is the part of the
    weights, where a schedule splits it (nothing, if they aren't given)."""
    apart = weights if kind == "zero-bubble" and weights else [0.0] * len(backward)
    if not len(forward) == len(backward) == len(apart) or len(forward) % chunks:
        raise UsageError(f"{len(forward)} forward and {len(backward)} backward times do not make stages of {chunks} chunks.")
    virtual, stages = len(forward), len(forward) // chunks
    hop = p2p if stages > 1 else 0.0
    queues = [order(kind, s, stages, micro_batches, chunks) for s in range(stages)]
    ends: dict[tuple[int, int, bool], Seconds] = {}
    clocks, positions = [0.0] * stages, [0] * stages
    done: list[list[Slot]] = [[] for _ in range(stages)]
    remaining = sum(map(len, queues))
    while remaining:
        before = remaining
        for s in range(stages):
            queue = queues[s]
            while positions[s] < len(queue):
                task = queue[positions[s]]
                k = task.chunk * stages + s
                ready = _ready(ends, k, virtual, task, hop)
                if ready is None:
                    break
                start = max(clocks[s], ready)
                lasts = apart[k] if task.weights else backward[k] - apart[k] if task.backward else forward[k]
                clocks[s] = end = start + lasts
                if not task.weights:  # for which nobody waits
                    ends[k, task.micro_batch, task.backward] = end
                done[s].append(Slot(s, task, start, end))
                positions[s] += 1
                remaining -= 1
        if remaining == before:
            raise UsageError(f"the order of {kind} waits for itself with {stages} stages and {micro_batches} micro-batches.")
    return Timeline(tuple(map(tuple, done)))


def filling(forward: Seconds, inputs: Seconds, weights: Seconds, full: bool = True) -> float:
    """What another stage adds to a step under zero-bubble, of its own seconds for a micro-batch; `full`: there are as many
    micro-batches as stages."""
    waits = max(forward, inputs, forward + inputs - weights) if full else forward + inputs
    return waits / (forward + inputs + weights)


def shared(share: float, micro_batches: int, stages: int, sharing: float) -> float:
    """What is left of a `share` (q of the module) where so many ranks share a device, which those that wait leave to others: a
    step of equal stages takes as long as all of one's work, or as its slots one after another, each as fast as one rank alone."""
    if stages == 1 or sharing <= 1:
        return share
    return max(0.0, slots(micro_batches, stages, share) / sharing - micro_batches) / (stages - 1)


def slots(micro_batches: int, stages: int, share: float = 1.0) -> float:
    """A step of equal stages lasts as long as so many micro-batches on one of them; `share`: q of the module."""
    return micro_batches + (stages - 1) * share


def additive_seconds(
    kind: ScheduleKind,
    stages: Sequence[Seconds],
    micro_batches: int,
    p2p: Seconds = 0.0,
    chunks: int = 1,
    share: float | None = None,
) -> Seconds:
    """Seconds of a step as a sum over stages, see the module; `stages[s]` are those of one micro-batch, both passes. `share`:
    q of the module, where it isn't 1 / chunks."""
    few = 1 / chunks if share is None else share
    passing = exposed_hops(kind, len(stages), micro_batches, chunks) * p2p
    return (micro_batches - few) * max(stages) + few * sum(stages) + passing


def exposed_hops(kind: ScheduleKind, stages: int, micro_batches: int, chunks: int = 1, hidden: bool = False) -> float:
    """How many times a stage waits for what is passed to it; `hidden`: gradients of weights take twice as long as a hop."""
    if stages == 1:
        return 0.0
    if kind == "gpipe":
        return 2.0 * (stages - 1)
    if kind in ("1f1b", "zero-bubble"):
        waits = 1 + (micro_batches - 1) / stages
        return 2 * (stages - 1) * (min(waits, 2.0) if hidden and kind == "zero-bubble" else waits)
    return 2.0 * (stages * chunks - 1)


def _ready(ends: dict[tuple[int, int, bool], Seconds], k: int, virtual: int, task: Task, hop: Seconds) -> Seconds | None:
    """When what a task waits for has arrived; None while it has not been scheduled."""
    i = task.micro_batch
    if not task.backward:
        return 0.0 if k == 0 else _arrival(ends.get((k - 1, i, False)), hop)
    if k == virtual - 1:
        return ends.get((k, i, False))
    return _arrival(ends.get((k + 1, i, True)), hop)


def _arrival(end: Seconds | None, hop: Seconds) -> Seconds | None:
    return None if end is None else end + hop


@lru_cache(maxsize=4096)
def pipeline_seconds(
    kind: ScheduleKind,
    forward: tuple[Seconds, ...],
    backward: tuple[Seconds, ...],
    micro_batches: int,
    p2p: Seconds = 0.0,
    chunks: int = 1,
    weights: tuple[Seconds, ...] = (),
) -> Seconds:
    """Seconds of a whole schedule; beyond `WARM` times the number of stages it continues with the slope that it has there."""
    stages = len(forward) // chunks
    if stages == 1 and chunks == 1:
        return micro_batches * (forward[0] + backward[0])
    period = 2 * stages  # of one micro-batch to the next, hops and unequal stages may hold each other up by turns
    warm = WARM * stages + micro_batches % period

    def seconds(m: int) -> Seconds:
        return (
            _seconds_1f1b(forward, backward, m, p2p)
            if kind == "1f1b"
            else timeline(kind, forward, backward, m, p2p, chunks, weights).seconds
        )

    if micro_batches <= warm:
        return seconds(micro_batches)
    late = seconds(warm)
    busiest = max(sum(forward[s::stages]) + sum(backward[s::stages]) for s in range(stages))
    each = max((late - seconds(warm - period)) / period, busiest)  # nearly equal stages take long to find their pace
    return late + (micro_batches - warm) * each


def _seconds_1f1b(forward: tuple[Seconds, ...], backward: tuple[Seconds, ...], micro_batches: int, hop: Seconds) -> Seconds:
    """`timeline("1f1b", ...).seconds` without its slots: in round i every stage s runs forward i and backward i - ahead(s),
    so that what a round needs is always of the round before (or of the stage before, in the same round)."""
    stages, m = len(forward), micro_batches
    clocks = [0.0] * stages
    forwards = [[0.0] * m for _ in range(stages)]
    backwards = [[0.0] * m for _ in range(stages)]
    for i in range(m + stages - 1):
        for s in range(stages):
            if i < m:
                ready = forwards[s - 1][i] + hop if s else 0.0
                start = clocks[s] if clocks[s] > ready else ready
                forwards[s][i] = clocks[s] = start + forward[s]
            j = i - stages + s + 1
            if 0 <= j < m:
                ready = backwards[s + 1][j] + hop if s < stages - 1 else forwards[s][j]
                start = clocks[s] if clocks[s] > ready else ready
                backwards[s][j] = clocks[s] = start + backward[s]
    return max(clocks)
