"""Time against memory: the fastest plans on less and less memory, each proven for the limit under which it was searched.

A plan that was found under the limit L and holds M bytes is the fastest under every limit from M to L. What is not known lies
between: below the M of one plan and above the L of the next leaner one, and below the leanest. The next limit is the middle of
such an interval: of the last one, until it is narrow or the leanest plan is too slow to be of use; then of that in which most
can be missing, by its width times the rise of the step across it. So a few searches show the whole line, not the first gigabyte
of it.

Limits are shares of a device's memory that are kept free, in thousandths, so that a user can ask for each plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import floor, inf

from autoplan.plan import Plan, Point
from autoplan.units import Bytes, Seconds

STEPS = 1000
"""Of head-room, from none to all: limits that differ by less are one."""
SAME = 1e-4
"""Steps that differ by less are as long: nothing is sought between them."""
SLOWEST = 2.0
"""Times the step of the first plan: once one is slower, none leaner is sought. It would be of no use, and takes long to find."""
SEARCHES = 2
"""At most so many a plan that is asked for: some find nothing that fits, or what is known."""


Solve = Callable[[float, Seconds], Point | None]
"""The fastest plan with a head-room, under which a step of so many seconds can be had; None when nothing fits."""


def frontier(first: Point, whole: Bytes, least: Bytes, number: int, solve: Solve) -> tuple[Point, ...]:
    """At most `number` plans, the fastest first; of devices that have `whole` bytes every plan takes `least` or more."""
    points, too_much = [first], _steps(1 - least / whole) + 1
    for _ in range(SEARCHES * (number - 1)):
        steps = _next(points, whole, too_much, number)
        if steps is None or len(points) == number:
            break
        leaner = [p.step_time for p in points if p.headroom * STEPS > steps]
        found = solve(steps / STEPS, min(leaner, default=inf))
        if found is None:
            too_much = steps
        else:  # it may be one that is known, which is then the fastest from this limit on
            points = sorted([*(p for p in points if p.memory != found.memory), found], key=lambda point: -point.memory)
    return unbeaten(points)


def _steps(headroom: float) -> int:
    """Rounded down, so that what needs the rest fits."""
    return floor(headroom * STEPS + 1e-6)


def _next(points: Sequence[Point], whole: Bytes, too_much: int, number: int) -> int | None:
    """The limit to search next, in steps; None when nothing is left."""
    ends = [_steps(1 - point.memory / whole) for point in points]
    """With so much head-room a plan fits, with more it doesn't."""
    fast = points[-1].step_time < SLOWEST * points[0].step_time
    if fast and too_much - ends[-1] > max(1, (too_much - ends[0]) // number):
        return (ends[-1] + too_much) // 2
    between = [
        ((_steps(lean.headroom) - end) * (lean.step_time - full.step_time), end, _steps(lean.headroom))
        for (full, lean), end in zip(pairwise(points), ends, strict=False)
        if lean.step_time > full.step_time * (1 + SAME) and _steps(lean.headroom) - end > 1
    ]
    if not between:
        return None
    _, low, high = max(between)
    return (low + high) // 2


def unbeaten(points: Sequence[Point]) -> tuple[Point, ...]:
    """Those that no leaner one equals or beats in time."""
    return tuple(
        one for one in points if not any(other.memory < one.memory and other.step_time <= one.step_time for other in points)
    )


def point(plan: Plan, headroom: float) -> Point:
    """What is told of a plan that was searched with a head-room."""
    pipeline = plan.pipeline
    return Point(
        headroom=headroom,
        mesh=plan.mesh,
        micro_batch=plan.micro_batch,
        schedule="" if pipeline is None else pipeline.schedule + (f" x {pipeline.chunks}" if pipeline.chunks > 1 else ""),
        recompute=_recompute(Counter(strategy.recompute for _, strategy in plan.layers())),
        step_time=plan.prediction.step_time,
        memory=plan.prediction.memory.total,
        tokens_per_second=plan.prediction.tokens_per_second,
    )


def _recompute(layers: Counter[str]) -> str:
    kinds = [kind for kind in ("full", "selective", "none") if layers[kind]]
    return kinds[0] if len(kinds) == 1 else ", ".join(f"{layers[kind]} {kind}" for kind in kinds)
