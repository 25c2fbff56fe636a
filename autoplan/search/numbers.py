"""How many devices: the fewest on which a model fits, or takes a step within some seconds; or the fastest, or the cheapest.

Over one global batch a token costs as much as a step, and a step  devices x step time  device-seconds: `device_seconds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

from autoplan.errors import AutoplanError, NothingFits, UsageError
from autoplan.hardware import HardwareProfile
from autoplan.plan import Plan
from autoplan.units import SECOND, Seconds, show


def counts(first: int, last: int, hardware: HardwareProfile) -> Iterator[int]:
    """Numbers of devices from `first` to `last` that people rent: any within one node, whole nodes above."""
    if not 1 <= first <= last:
        raise UsageError(f"{first}..{last} is no range of GPUs.", "Write the smaller number first: 8..64.")
    spans = [link.span for link in hardware.links if link.span > 1]
    node = spans[0] if spans else 1
    found = [number for number in range(first, last + 1) if number <= node or number % node == 0]
    if not found:
        raise UsageError(f"no number from {first} to {last} is a multiple of a node's {node} GPUs.", "Widen the range.")
    yield from found


def fewest(numbers: Iterator[int], plan: Callable[[int], Plan], step_time: Seconds | None = None) -> Plan:
    """The plan for the first of `numbers` for which `plan(number)` fits and takes at most `step_time` seconds.

    Raises `NothingFits` when there is none, with the fastest step that was found, or what kept the last number from fitting.
    """
    fastest: Plan | None = None
    missed: AutoplanError | None = None
    for number in numbers:
        try:
            found = plan(number)
        except (NothingFits, UsageError) as error:  # an axis that was asked for need not divide every number
            missed = error
            continue
        if step_time is None or found.prediction.step_time <= step_time or found.solve.stopped == "interrupted":
            return found
        if fastest is None or found.prediction.step_time < fastest.prediction.step_time:
            fastest = found
    if fastest is not None and step_time is not None:
        raise NothingFits(
            f"No number of GPUs in the range takes a step within {show(step_time, SECOND)}: the fastest, {fastest.mesh}, takes "
            f"{show(fastest.prediction.step_time, SECOND)}.",
            "Ask for more GPUs, a longer step or a smaller global batch.",
        )
    assert missed is not None
    raise missed


def least(
    numbers: Iterator[int], plan: Callable[[int], Plan], cost: Callable[[Plan], float], step_time: Seconds | None = None
) -> Plan:
    """Of the plans for all `numbers` that fit, and take at most `step_time` seconds, the one of the least `cost`.

    Raises `NothingFits` when there is none.
    """
    best: Plan | None = None
    rest = iter(numbers)
    for number in rest:
        try:
            found = fewest(chain([number], rest), plan, step_time) if best is None else fewest(iter([number]), plan, step_time)
        except AutoplanError:
            if best is None:
                raise
            continue
        if best is None or cost(found) < cost(best):
            best = found
        if found.solve.stopped == "interrupted":
            break
    assert best is not None
    return best


def device_seconds(plan: Plan) -> Seconds:
    """Of one step, over all devices: what it costs."""
    return plan.mesh.size * plan.prediction.step_time


def step_seconds(plan: Plan) -> Seconds:
    """Of one step: the fewest are the most tokens a second."""
    return plan.prediction.step_time
