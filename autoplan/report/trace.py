"""The predicted step as a Chrome trace: open it at ui.perfetto.dev or in chrome://tracing.

Every pipeline rank is a process with one thread that computes and one that sends. Without a pipeline the plan has no timeline,
only sums: every micro-batch then gets its share of each part, one after another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from autoplan.errors import UsageError
from autoplan.plan import Pipeline, Plan
from autoplan.report import words
from autoplan.report.pipeline import virtual
from autoplan.schedule import Slot, Timeline, timeline
from autoplan.units import Seconds

MOST = 200_000
"""Slices of a trace that a viewer still opens."""

COMPUTE, SEND = 0, 1

Event = dict[str, Any]


def trace_json(plan: Plan) -> str:
    """The text of a .trace.json file. Raises `UsageError` when the step has more slices than a viewer can show."""
    events = list(_piped(plan, plan.pipeline) if plan.pipeline and plan.prediction.stages else _flat(plan))
    about = {"made by": "autoplan", "model": words.clean(plan.model), "what": "a prediction, not a measurement"}
    head = json.dumps({"displayTimeUnit": "ms", "otherData": about})[:-1]
    return head + ', "traceEvents": [\n' + ",\n".join(json.dumps(event) for event in events) + "\n]}\n"


def _piped(plan: Plan, pipeline: Pipeline) -> Iterator[Event]:
    hop, split = plan.prediction.hop, pipeline.schedule == "zero-bubble"
    _check((5 if split else 4) * plan.micro_batches * pipeline.chunks * plan.mesh.pp)
    forward, backward, weights = virtual(plan, pipeline)
    made = timeline(pipeline.schedule, forward, backward, plan.micro_batches, hop, pipeline.chunks, weights)
    for s, slots in enumerate(made.stages):
        held = ", ".join(words.fold(names) for names in plan.stages[s :: plan.mesh.pp])
        yield from _process(s, f"pp {s}: {held}", hop > 0)
        for slot in slots:
            yield _slot(slot, pipeline.chunks, split)
            if hop and _sends(slot, plan.mesh.pp, pipeline.chunks):
                yield _slice(s, SEND, "send", slot.end, hop, {"micro_batch": slot.task.micro_batch, "chunk": slot.task.chunk})
    yield from _once(plan, made)


def _slot(slot: Slot, chunks: int, split: bool) -> Event:
    task = slot.task
    name = f"{words.pass_of(task.backward, task.weights, split)} {task.micro_batch}"
    told = {"micro_batch": task.micro_batch, **({"chunk": task.chunk} if chunks > 1 else {})}
    return _slice(slot.stage, COMPUTE, name, slot.start, slot.end - slot.start, told)


def _sends(slot: Slot, pp: int, chunks: int) -> bool:
    """All virtual stages but the last pass activations on, all but the first pass gradients back."""
    if slot.task.weights:
        return False
    k = slot.task.chunk * pp + slot.stage
    return k > 0 if slot.task.backward else k < pp * chunks - 1


def _once(plan: Plan, made: Timeline) -> Iterator[Event]:
    """What is left of the step behind the timeline."""
    left = (plan.prediction.simulated or 0.0) - made.seconds
    if left > 0:
        for s in range(plan.mesh.pp):
            yield _slice(s, COMPUTE, "gradients and optimizer", made.seconds, left, {})


def _flat(plan: Plan) -> Iterator[Event]:
    time, m = plan.prediction.time, plan.micro_batches
    every = [(name, seconds / m) for name, seconds in time.items() if seconds and name != "optimizer"]
    _check(m * len(every))
    yield from _process(0, f"one device of {plan.mesh.size}", False)
    at = 0.0
    for i in range(m):
        for name, seconds in every:
            yield _slice(0, COMPUTE, words.TIME_WORDS[name][0], at, seconds, {"micro_batch": i, "share": "average"})
            at += seconds
    if time.optimizer:
        yield _slice(0, COMPUTE, words.TIME_WORDS["optimizer"][0], at, time.optimizer, {})


def _check(slices: int) -> None:
    if slices > MOST:
        raise UsageError(
            f"a trace of this step has {words.count(slices)} slices, too many for a viewer.", "Look at the HTML report instead."
        )


def _process(pid: int, name: str, sends: bool) -> Iterator[Event]:
    yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
    yield {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}
    yield {"ph": "M", "pid": pid, "tid": COMPUTE, "name": "thread_name", "args": {"name": "compute"}}
    if sends:
        yield {"ph": "M", "pid": pid, "tid": SEND, "name": "thread_name", "args": {"name": "send"}}


def _slice(pid: int, tid: int, name: str, start: Seconds, seconds: Seconds, told: dict[str, Any]) -> Event:
    """A complete event; a trace counts in microseconds."""
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "name": name,
        "cat": name.split(" ")[0].lower().rstrip(","),
        "ts": round(start * 1e6, 3),
        "dur": round(seconds * 1e6, 3),
        "args": told,
    }
