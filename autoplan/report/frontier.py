"""Time against memory: the fastest plans on less and less memory, as rows and as a line."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from autoplan.plan import Plan, Point
from autoplan.report import charts, words
from autoplan.report.facts import headline
from autoplan.units import BYTE

_GIB = dict(BYTE.prefixes)["GiB"]
SAME = 1e-4
"""Steps that differ by less are as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierRow:
    """A plan that none beats in both step time and memory."""

    mesh: str
    schedule: str
    micro_batch: int
    recompute: str
    step_time: str
    slower: str
    """Than the plan at hand."""
    memory: str
    throughput: str
    headroom: str
    """What `--memory-headroom` takes to get it."""
    chosen: bool


def rows(plan: Plan) -> tuple[FrontierRow, ...]:
    """The fastest first; none where they were not asked for."""
    return tuple(_row(plan, point) for point in plan.frontier)


def _row(plan: Plan, point: Point) -> FrontierRow:
    slower = point.step_time / plan.prediction.step_time - 1 if plan.prediction.step_time else 0.0
    return FrontierRow(
        mesh=str(point.mesh),
        schedule=words.clean(point.schedule),
        micro_batch=point.micro_batch,
        recompute=words.clean(point.recompute),
        step_time=words.seconds(point.step_time),
        slower=words.percent(slower) if slower > SAME else "-",
        memory=words.size(point.memory),
        throughput=f"{point.tokens_per_second:,.0f}",
        headroom=f"{100 * point.headroom:.4g}%",
        chosen=_chosen(plan, point),
    )


def _chosen(plan: Plan, point: Point) -> bool:
    return (point.mesh, point.memory, point.step_time) == (plan.mesh, plan.prediction.memory.total, plan.prediction.step_time)


def chart(plan: Plan) -> str:
    """With so much memory a step takes so long: a stair through the plans, since with less than one needs the next leaner one
    is had. Empty where there is one plan or none."""
    if len(plan.frontier) < 2:
        return ""
    small = max(point.step_time for point in plan.frontier) < 1
    unit, scale = ("milliseconds", 1e3) if small else ("seconds", 1.0)
    places = [(point.memory / _GIB, point.step_time * scale) for point in plan.frontier]
    stair = [places[0]]
    for (x, _), (leaner, y) in pairwise(places):
        stair += [(x, y), (leaner, y)]
    marks = [
        charts.Point(x, y, "chosen" if row.chosen else "slower", _title(row), "this plan" if row.chosen else "")
        for (x, y), row in zip(places, rows(plan), strict=True)
    ]
    marks.sort(key=lambda mark: mark.kind == "chosen")
    return charts.scatter(
        marks,
        "Step time of the fastest plans on less and less memory",
        "memory of a device, GiB",
        f"{unit} a step",
        plan.memory_limit / _GIB,
        f"limit {headline(plan).limit}",
        stair,
    )


def _title(row: FrontierRow) -> str:
    where = ", ".join(filter(None, (row.mesh, row.schedule, f"micro-batch {row.micro_batch}", f"recompute {row.recompute}")))
    return f"{where}: {row.step_time}, {row.memory}"
