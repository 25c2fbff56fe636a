"""A plan as one HTML file: no request to any network, readable without JavaScript, on paper, by keyboard, in the dark.

The template escapes every text. The only trusted pieces are the charts (which escape their own) and the two files beside
this one; a content policy lets the browser run that one script and no other.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from autoplan.plan import Plan
from autoplan.report import charts, facts, frontier, gantt, layers, pipeline, sure, versus, words
from autoplan.units import BYTE

MAX_CANDIDATES = 300
"""Rows of the table and marks of the scatter: a page that opens at once. What is left out is counted."""

MAX_CELLS = 160
"""Layers that are drawn one by one in a run; further ones are counted."""

MAX_DEVICES = 32
"""Devices that are drawn one by one; with a pipeline half of them in each of its rows."""

MAX_GROUPS = 12
"""Data-parallel groups that are drawn: about one line of a wide screen."""

_TIMES = "\N{MULTIPLICATION SIGN}"
_HERE = Path(__file__).parent
_UNIT = re.compile(r"(?<=\d) (?=(?:s|ms|us)\b)|(?<=tp) (?=\d)|(?<=shard) (?=\d)|(?<=replicate) (?=\d)|(?<=pp) (?=\d)")
_GIB = dict(BYTE.prefixes)["GiB"]
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"


MAX_CHUNKS = 2
"""Parts of the model on one pipeline rank whose layers are named beside its devices."""

MAX_COLUMNS = 8
"""Pipeline ranks whose memory stands side by side in a table; of more only the fullest is told by category."""

MAX_STAGES = 8
"""Pipeline ranks that the mesh's picture has."""


@dataclass(frozen=True, slots=True)
class Group:
    """Devices that see the same samples: one box of the mesh's picture."""

    title: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A pipeline rank: one row of the mesh's picture."""

    title: str
    layers: str
    groups: tuple[Group, ...]
    more: int
    """Groups that are not drawn."""


def page(plan: Plan) -> str:
    """The whole report. A pure function: the same plan gives the same bytes."""
    candidates = facts.candidates(plan)
    film = pipeline.film(plan)
    return _template("page.html.j2").render(
        plan=plan,
        head=facts.headline(plan),
        speedups=facts.speedups(plan),
        axes=words.mesh_meaning(plan.mesh),
        stages=mesh_stages(plan),
        more_stages=max(0, plan.mesh.pp - MAX_STAGES),
        strip=layers.strip(plan),
        runs=layers.runs(plan),
        cards=layers.cards(plan),
        max_cells=MAX_CELLS,
        max_columns=MAX_COLUMNS,
        matrix=lambda style: Markup(charts.matrix(style, plan.mesh.ep if style == "experts" else plan.mesh.tp)),
        ranks=pipeline.ranks(plan),
        rank_bars=rank_bars(plan),
        film=film,
        gantt=Markup(gantt.gantt(film, timeline_label(plan))) if film else "",
        schedule=pipeline.schedule_words(plan.pipeline) if plan.pipeline else "",
        bubble=words.percent(plan.prediction.time.bubble / plan.prediction.step_time) if plan.prediction.step_time else "",
        hop=words.seconds(plan.prediction.hop),
        simulated=facts.simulated(plan),
        memory=facts.memory_parts(plan),
        allocated=facts.allocated(plan),
        memory_bar=Markup(memory_bar(plan)),
        time=facts.time_parts(plan),
        time_bar=Markup(charts.stacked_bar(facts.time_parts(plan), "Where the time of one step goes")),
        candidates=candidates[:MAX_CANDIDATES],
        left_out=len(candidates) - len(candidates[:MAX_CANDIDATES]),
        scheduled=any(row.schedule for row in candidates),
        counts=facts.candidate_counts(plan),
        scatter=Markup(scatter(plan)),
        frontier=frontier.rows(plan),
        frontier_scheduled=any(point.schedule for point in plan.frontier),
        frontier_chart=Markup(frontier.chart(plan)),
        baselines=facts.baselines(plan),
        workload=facts.workload(plan),
        hardware=facts.hardware(plan),
        errors=sure.errors(plan),
        warnings=facts.warnings(plan),
        commands=facts.commands(plan),
        **_trusted(),
    )


def comparison(plans: versus.Named) -> str:
    """Two to five plans side by side, as a page of its own."""
    names = versus.names(plans)
    slowest = max(plan.prediction.step_time for _, plan in plans)
    fullest = max(max(plan.prediction.memory.total, plan.memory_limit) for _, plan in plans)
    return _template("compare.html.j2").render(
        names=names,
        verdict=versus.verdict(plans),
        caution=versus.caution(plans),
        costs=versus.costs(plans),
        choices=versus.choices(plans),
        time=versus.parts(plans, facts.time_parts),
        memory=versus.parts(plans, facts.memory_parts),
        time_keys=_used(plans, facts.time_parts),
        memory_keys=_used(plans, facts.memory_parts),
        time_bars=[
            (name, Markup(charts.stacked_bar(facts.time_parts(plan), f"Step of {name}", longest=slowest)), head.step_time)
            for name, (_, plan) in zip(names, plans, strict=True)
            for head in [facts.headline(plan)]
        ],
        memory_bars=[
            (name, Markup(memory_bar(plan, fullest)), facts.headline(plan).memory)
            for name, (_, plan) in zip(names, plans, strict=True)
        ],
        **_trusted(),
    )


def _used(plans: versus.Named, of: Callable[[Plan], tuple[facts.Part, ...]]) -> list[facts.Part]:
    """The parts that are not zero in every plan: what the bars' legend names."""
    return [row[0] for row in zip(*(of(plan) for _, plan in plans), strict=True) if any(part.value for part in row)]


def render(template: str, **facts: Any) -> str:
    """A page of this house from a template and its facts."""
    return _template(template).render(**facts, **_trusted())


def _trusted() -> dict[str, Any]:
    """The style and the script of a page, and the policy that allows these and nothing else."""
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = Markup((_HERE / "page.css").read_text(encoding="utf-8"))
    return {"style": style, "script": Markup(script), "policy": _POLICY.format(digest=digest)}


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["times"] = lambda text: str(text).replace(" x ", f" {_TIMES} ")
    environment.filters["factors"] = lambda text: re.sub(r"(?<=\d)x\b", _TIMES, str(text))
    environment.filters["glued"] = lambda text: _UNIT.sub("\N{NO-BREAK SPACE}", str(text))
    environment.filters["percent"] = words.percent
    return environment.get_template(name)


def mesh_stages(plan: Plan) -> tuple[Stage, ...]:
    """The first pipeline ranks, each with its first data-parallel groups; one without a pipeline. Ranks count up along the
    axes of the mesh, the innermost first."""
    mesh, within = plan.mesh, plan.mesh.within.size
    in_row = MAX_DEVICES // (2 if mesh.pp > 1 else 1)
    shown = max(1, min(mesh.dp, MAX_GROUPS, in_row // within))
    return tuple(
        Stage(
            title=f"pp {s}" if mesh.pp > 1 else "",
            layers=_layers_of(plan.stages[s :: mesh.pp]) if mesh.pp > 1 else "",
            groups=tuple(
                Group(_group_title(plan, group), tuple(range(first, first + min(within, MAX_DEVICES))))
                for group in range(shown)
                for first in [(s * mesh.dp + group) * within]
            ),
            more=mesh.dp - shown,
        )
        for s in range(min(mesh.pp, MAX_STAGES))
    )


def _layers_of(chunks: Sequence[tuple[str, ...]]) -> str:
    """Names, where there are few to be told; the pipeline's table has them all."""
    if len(chunks) <= MAX_CHUNKS:
        return ", ".join(words.fold(names) for names in chunks)
    return f"{words.plural(sum(map(len, chunks)), 'layer')} in {len(chunks)} chunks"


def _group_title(plan: Plan, group: int) -> str:
    replica, shard = divmod(group, plan.mesh.dp_shard)
    names = [("replica", replica, plan.mesh.dp_replicate), ("shard", shard, plan.mesh.dp_shard)]
    return ", ".join(f"{name} {place}" for name, place, size in names if size > 1) or ("" if plan.mesh.pp > 1 else "all samples")


def timeline_label(plan: Plan) -> str:
    """What the picture of the pipeline shows, for those who do not see it."""
    idle = ", ".join(f"rank {row.rank} {row.idle}" for row in pipeline.ranks(plan))
    return (
        f"What each of {plan.mesh.pp} pipeline ranks does when: {words.plural(plan.micro_batches, 'micro-batch')} forward and "
        f"backward. Idle: {idle}"
    )


def rank_bars(plan: Plan) -> tuple[tuple[pipeline.RankRow, Markup], ...]:
    """Every pipeline rank with its memory by category, all bars on one scale."""
    rows = pipeline.ranks(plan)
    fullest = max((sum(part.value for part in row.parts) for row in rows), default=0.0)
    limit, head = plan.memory_limit, facts.headline(plan)
    return tuple(
        (
            row,
            Markup(
                charts.stacked_bar(
                    row.parts, f"Rank {row.rank}: {row.memory} of {head.limit}", limit, f"limit: {head.limit}", fullest
                )
            ),
        )
        for row in rows
    )


def memory_bar(plan: Plan, longest: float = 0.0) -> str:
    """The peak by category against the limit."""
    head = facts.headline(plan)
    label = f"Peak memory {head.memory} of {head.limit} by category"
    return charts.stacked_bar(facts.memory_parts(plan), label, plan.memory_limit, f"limit: {head.limit}", longest)


def scatter(plan: Plan) -> str:
    """Everything with a known time and memory; empty when that is one point or none."""
    points = _candidate_points(plan) + _baseline_points(plan)
    points.sort(key=lambda point: ("refused", "bound", "slower", "baseline", "chosen").index(point.kind))
    if len(points) < 2:
        return ""
    limit = plan.memory_limit / _GIB
    unit = "seconds"
    if max(point.y for point in points) < 1:
        unit, points = "milliseconds", [replace(point, y=point.y * 1e3) for point in points]
    label = "Step time against memory of the plan, its rivals and the baselines"
    return charts.scatter(
        points, label, "memory of a device, GiB", f"{unit} a step", limit, f"limit {facts.headline(plan).limit}"
    )


def _candidate_points(plan: Plan) -> list[charts.Point]:
    points = []
    for row in facts.candidates(plan)[:MAX_CANDIDATES]:
        if row.seconds is None or row.bytes is None:
            continue
        kind = {"chosen": "chosen", "slower": "bound" if row.bound else "slower"}.get(row.status, "refused")
        where = ", ".join(filter(None, (row.mesh, row.schedule, f"micro-batch {row.micro_batch}")))
        title = f"{where}: {row.step_time}, {row.memory}. {row.status}: {row.reason}"
        points.append(charts.Point(row.bytes / _GIB, row.seconds, kind, title, "this plan" if kind == "chosen" else ""))
    return points


def _baseline_points(plan: Plan) -> list[charts.Point]:
    points = []
    for base, row in zip(plan.baselines, facts.baselines(plan), strict=True):
        if base.step_time is not None and base.memory is not None:
            title, label = f"{row.name}: {row.step_time}, {row.memory}", row.name.partition(":")[0][:20]
            points.append(charts.Point(base.memory / _GIB, base.step_time, "baseline", title, label))
    return points
