"""Measure what the suite says within a budget of time, keep every number as soon as it is there. No torch in here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from autoplan.errors import UsageError
from autoplan.measurement import Measurement, Operation, summarised
from autoplan.profile.bench import Bench
from autoplan.units import SECOND, Seconds, show

FEWEST = 5
"""Timings that a median is made of."""
NOISY = 0.25
"""A spread (MAD over median) at which an operation is timed again ..."""
AGAIN = 2
"""... so often at most; the calmest time counts ..."""
TOO_NOISY = 0.6
"""... and a spread that says nothing any more."""


@dataclass(frozen=True, slots=True)
class Step:
    """How far a session is: after operation `done` of `total`."""

    done: int
    total: int
    operation: Operation
    measurement: Measurement | None
    """None: left out, because it would have taken too long."""


Tell = Callable[[Step], None]
Keep = Callable[[Measurement], None]


def measured(
    bench: Bench,
    todo: Sequence[Operation],
    budget: Seconds,
    known: Iterable[Measurement] = (),
    keep: Keep = lambda _: None,
    tell: Tell = lambda _: None,
) -> list[Measurement]:
    """All operations of `todo`, in about `budget` seconds: each has an equal share of what is left.

    What is `known` is not measured again. Those of a series that would take more than their share are left out.
    Raises `UsageError` for a time that is none, and on a machine too busy for its times to mean anything.
    """
    have = {each.operation: each for each in known}
    left_out: set[Operation] = set()
    begin = bench.clock()
    for done, operation in enumerate(todo, 1):
        found = have.get(operation)
        if found is None:
            left = budget - (bench.clock() - begin)
            share = max(left, 0.0) / sum(each not in have for each in todo[done - 1 :])
            if not _affordable(operation, share, have):
                left_out.add(operation)
            else:
                found = have[operation] = _timed(bench, operation, share)
                keep(found)
        tell(Step(done, len(todo), operation, found))
    return [have[operation] for operation in todo if operation in have]


def _affordable(operation: Operation, share: Seconds, have: dict[Operation, Measurement]) -> bool:
    """Whether the least number of runs takes not much longer than the share; the first three of a series always do."""
    series = [each for each in have.values() if each.operation.series == operation.series]
    if len(series) < 3:
        return True
    above = [each.seconds for each in series if each.operation.size >= operation.size]
    largest = max(series, key=lambda each: each.operation.size)
    expected = min(above, default=largest.seconds * operation.size / largest.operation.size)
    return (FEWEST + 2) * expected <= 2 * share


def _timed(bench: Bench, operation: Operation, share: Seconds) -> Measurement:
    found = summarised(operation, bench.times(operation, share))
    for _ in range(AGAIN):
        if found.spread <= NOISY * found.seconds:
            break
        again = summarised(operation, bench.times(operation, share))
        found = min(found, again, key=lambda each: each.spread / each.seconds)
    if found.spread > TOO_NOISY * found.seconds:
        raise UsageError(
            f"this machine is too busy to be measured: '{operation}' takes {show(found.seconds, SECOND)}, half of the time "
            f"{show(found.spread, SECOND)} more or less.",
            "Try again when nothing else runs; what was measured so far is kept.",
        )
    return found
