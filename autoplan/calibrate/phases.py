"""Where one step's seconds went, from the events of the PyTorch profiler.

Communication counts where nothing is computed meanwhile; backward, optimizer and forward are what is computed inside the
autograd engine, inside `Optimizer.step`, and elsewhere. On a GPU the kernels are looked at, each in the phase that launched it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from autoplan.measurement import Phases
from autoplan.units import Seconds

Span = tuple[float, float]

_SENDS = ("gloo:", "nccl:", "ncclDevKernel", "nccl")


def phases_of(profiler: Any) -> Phases:
    """Seconds of the profiled step by phase."""
    events = list(profiler.events())
    sent, work, backward, optimizer = [], [], [], []
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        if event.name.startswith(_SENDS):
            sent.append(span)
        elif event.name.startswith("autograd::engine::evaluate_function"):
            backward.append(span)
        elif event.name.startswith("Optimizer.step"):
            optimizer.append(span)
        elif event.name.startswith("aten::") and not event.cpu_children:
            work.append(span)
    device = [event for event in events if "CUDA" in str(event.device_type) and not event.name.startswith(_SENDS)]
    if device:
        work = [(event.time_range.start, event.time_range.end) for event in device]
    computing = union(work)
    stepping, returning = union(optimizer), union(backward)
    return Phases(
        forward=_seconds(without(without(computing, returning), stepping)),
        backward=_seconds(within(computing, returning)),
        communication=_seconds(without(union(sent), computing)),
        optimizer=_seconds(stepping),
    )


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time, each moment once, in order."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        elif end > start:
            found.append((start, end))
    return found


def within(spans: list[Span], others: list[Span]) -> list[Span]:
    """What of `spans` lies inside `others`; both are unions."""
    found, j = [], 0
    for start, end in spans:
        while j < len(others) and others[j][1] <= start:
            j += 1
        k = j
        while k < len(others) and others[k][0] < end:
            found.append((max(start, others[k][0]), min(end, others[k][1])))
            k += 1
    return found


def without(spans: list[Span], others: list[Span]) -> list[Span]:
    """What of `spans` lies outside `others`; both are unions."""
    found, j = [], 0
    for start, end in spans:
        while j < len(others) and others[j][1] <= start:
            j += 1
        k, at = j, start
        while k < len(others) and others[k][0] < end:
            if others[k][0] > at:
                found.append((at, others[k][0]))
            at = max(at, others[k][1])
            k += 1
        if at < end:
            found.append((at, end))
    return found


def _seconds(spans: list[Span]) -> Seconds:
    return sum(end - start for start, end in spans) / 1e6
