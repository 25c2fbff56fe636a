"""What is told of a mesh and micro-batch that was not chosen: how much slower it is at least, or what it lacks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from autoplan.plan import Candidate
from autoplan.search.nodes import AnySchedule
from autoplan.search.stages import Staging
from autoplan.strategy import Mesh
from autoplan.units import BYTE, SECOND, Bytes, Seconds, show


def _schedule_words(staging: Staging) -> str:
    if staging.ranks == 1 or isinstance(staging, AnySchedule):
        return ""
    return staging.schedule if staging.chunks == 1 else f"{staging.schedule} x {staging.chunks}"


def slower(staging: Staging, seconds: Seconds, *, bound: bool) -> Candidate:
    """It takes `seconds`, or with `bound` at least that."""
    priced = staging.priced
    return Candidate(
        mesh=priced.mesh,
        micro_batch=priced.micro_batch,
        schedule=_schedule_words(staging),
        status="slower",
        reason="",
        step_time=seconds,
        bound=bound,
    )


def too_big(staging: Staging, limit: Bytes) -> Candidate:
    """It does not fit."""
    priced = staging.priced
    return out_of_memory(priced.mesh, priced.micro_batch, _schedule_words(staging), staging.least_memory, limit)


def out_of_memory(mesh: Mesh, micro_batch: int, schedule: str, needed: Bytes, limit: Bytes) -> Candidate:
    """It needs at least so many bytes; where that's within the limit, its parts don't fit together."""
    if needed > limit:
        reason = f"needs at least {show(needed, BYTE)} of {show(limit, BYTE)}"
    else:
        reason = f"no choice of strategies fits {show(limit, BYTE)}"
    return Candidate(
        mesh=mesh,
        micro_batch=micro_batch,
        schedule=schedule,
        status="out of memory",
        reason=reason,
        memory=max(needed, limit),
    )


def best_of_each(*verdicts: Iterable[Candidate]) -> dict[tuple[Mesh, int], Candidate]:
    """One candidate for every (mesh, micro-batch): that of its best stream layout."""
    found: dict[tuple[Mesh, int], Candidate] = {}
    for candidate in (c for some in verdicts for c in some):
        key = (candidate.mesh, candidate.micro_batch)
        if key not in found or rank(candidate) < rank(found[key]):
            found[key] = candidate
    return found


def rank(candidate: Candidate) -> tuple[int, float]:
    """The order of the list: what was solved by its seconds, then bounds, then what does not fit by its bytes."""
    order = {"chosen": 0, "slower": 1, "out of memory": 3, "illegal": 4}[candidate.status] + candidate.bound
    return order, candidate.step_time if candidate.step_time is not None else candidate.memory or 0.0


def told(candidate: Candidate, best: Seconds) -> Candidate:
    """With the reason in words."""
    if candidate.status != "slower" or candidate.step_time is None:
        return candidate
    more = max(0.0, 100 * (candidate.step_time / best - 1))
    slower_by = f"{more:.0f} % slower" if more >= 10 else f"{more:.1f} % slower" if more >= 0.05 else "not faster"
    least = "at least " if candidate.bound else ""
    return replace(candidate, reason=f"{least}{show(candidate.step_time, SECOND)}, {least if more >= 0.05 else ''}{slower_by}")
