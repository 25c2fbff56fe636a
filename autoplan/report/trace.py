"""The predicted step as a Chrome trace: open it at ui.perfetto.dev or in chrome://tracing.

It shows the event simulation of the plan (`autoplan.cost.events`): every pipeline rank is a process, every stream of one of its
devices a thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from autoplan.cost import events
from autoplan.cost.simulated import step_of
from autoplan.errors import UsageError
from autoplan.plan import Plan
from autoplan.report import words

MOST = 200_000
"""Slices of a trace that a viewer still opens."""

Slice = dict[str, Any]


def trace_json(plan: Plan) -> str:
    """The text of a .trace.json file. Raises `UsageError` when the plan does not say what its layers take, or the step has more
    slices than a viewer can show."""
    slices = list(_slices(plan))
    about = {"made by": "autoplan", "model": words.clean(plan.model), "what": "a prediction, not a measurement"}
    head = json.dumps({"displayTimeUnit": "ms", "otherData": about})[:-1]
    return head + ', "traceEvents": [\n' + ",\n".join(json.dumps(each) for each in slices) + "\n]}\n"


def _slices(plan: Plan) -> Iterator[Slice]:
    step = step_of(plan)
    number = events.count(step)
    if number > MOST:
        raise UsageError(
            f"a trace of this step has up to {words.count(number)} slices, too many for a viewer.",
            "Look at the HTML report instead.",
        )
    found = events.events(step)
    for rank in range(step.ranks):
        held = ", ".join(words.fold(names) for names in plan.stages[rank :: step.ranks])
        yield from _process(rank, f"pp {rank}: {held}" if plan.pipeline else f"one device of {plan.mesh.size}: {held}")
    for stream, rank in dict.fromkeys((event.stream, event.rank) for event in found):
        thread = {"pid": rank, "tid": events.STREAMS.index(stream)}
        yield {"ph": "M", **thread, "name": "thread_name", "args": {"name": stream}}
        yield {"ph": "M", **thread, "name": "thread_sort_index", "args": {"sort_index": thread["tid"]}}
    yield from map(_slice, found)


def _process(rank: int, name: str) -> Iterator[Slice]:
    yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": name}}
    yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}}


def _slice(event: events.Event) -> Slice:
    """A complete event; a trace counts in microseconds."""
    return {
        "ph": "X",
        "pid": event.rank,
        "tid": events.STREAMS.index(event.stream),
        "name": words.clean(event.name),
        "cat": event.stream,
        "ts": round(event.start * 1e6, 3),
        "dur": round((event.end - event.start) * 1e6, 3),
        "args": {} if event.micro_batch < 0 else {"micro_batch": event.micro_batch},
    }
