"""A plan as one HTML file: no request to any network, readable without JavaScript, on paper, by keyboard, in the dark.

The template escapes every text. The only trusted pieces are the charts (which escape their own) and the two files beside
this one; a content policy lets the browser run that one script and no other.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from autoplan.plan import Plan
from autoplan.report import charts, facts, layers, words
from autoplan.units import BYTE

MAX_CANDIDATES = 300
"""Rows of the table and marks of the scatter: a page that opens at once. What is left out is counted."""

MAX_CELLS = 160
"""Layers that are drawn one by one in a run; further ones are counted."""

MAX_DEVICES = 32
"""Devices that are drawn one by one."""

MAX_GROUPS = 12
"""Data-parallel groups that are drawn: about one line of a wide screen."""

_TIMES = "\N{MULTIPLICATION SIGN}"
_HERE = Path(__file__).parent
_UNIT = re.compile(r"(?<=\d) (?=(?:s|ms|us)\b)|(?<=tp) (?=\d)|(?<=shard) (?=\d)|(?<=replicate) (?=\d)")
_GIB = dict(BYTE.prefixes)["GiB"]
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"


@dataclass(frozen=True, slots=True)
class Group:
    """Devices that see the same samples: one box of the mesh's picture."""

    title: str
    ranks: tuple[int, ...]


def page(plan: Plan) -> str:
    """The whole report. A pure function: the same plan gives the same bytes."""
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    candidates = facts.candidates(plan)
    groups = mesh_groups(plan)
    return _template().render(
        plan=plan,
        head=facts.headline(plan),
        speedups=facts.speedups(plan),
        axes=words.mesh_meaning(plan.mesh),
        groups=groups,
        more_groups=plan.mesh.dp - len(groups),
        runs=layers.runs(plan),
        cards=layers.cards(plan),
        max_cells=MAX_CELLS,
        matrix=lambda style: Markup(charts.matrix(style, plan.mesh.tp)),
        memory=facts.memory_parts(plan),
        memory_bar=Markup(memory_bar(plan)),
        time=facts.time_parts(plan),
        time_bar=Markup(charts.stacked_bar(facts.time_parts(plan), "Where the time of one step goes")),
        candidates=candidates[:MAX_CANDIDATES],
        left_out=len(candidates) - len(candidates[:MAX_CANDIDATES]),
        counts=facts.candidate_counts(plan),
        scatter=Markup(scatter(plan)),
        baselines=facts.baselines(plan),
        workload=facts.workload(plan),
        hardware=facts.hardware(plan),
        warnings=facts.warnings(plan),
        commands=facts.commands(plan),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        policy=_POLICY.format(digest=digest),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["times"] = lambda text: str(text).replace(" x ", f" {_TIMES} ")
    environment.filters["factors"] = lambda text: re.sub(r"(?<=\d)x\b", _TIMES, str(text))
    environment.filters["glued"] = lambda text: _UNIT.sub("\N{NO-BREAK SPACE}", str(text))
    environment.filters["percent"] = words.percent
    return environment.get_template("page.html.j2")


def mesh_groups(plan: Plan) -> tuple[Group, ...]:
    """The first data-parallel groups with the ranks of their devices, outermost axis first as in the mesh."""
    mesh = plan.mesh
    shown = max(1, min(mesh.dp, MAX_GROUPS, MAX_DEVICES // mesh.tp))
    return tuple(
        Group(_group_title(plan, group), tuple(range(group * mesh.tp, group * mesh.tp + min(mesh.tp, MAX_DEVICES))))
        for group in range(shown)
    )


def _group_title(plan: Plan, group: int) -> str:
    replica, shard = divmod(group, plan.mesh.dp_shard)
    names = [("replica", replica, plan.mesh.dp_replicate), ("shard", shard, plan.mesh.dp_shard)]
    return ", ".join(f"{name} {place}" for name, place, size in names if size > 1) or "all samples"


def memory_bar(plan: Plan) -> str:
    """The peak by category against the limit."""
    head = facts.headline(plan)
    label = f"Peak memory {head.memory} of {head.limit} by category"
    return charts.stacked_bar(facts.memory_parts(plan), label, plan.memory_limit, f"limit: {head.limit}")


def scatter(plan: Plan) -> str:
    """Everything with a known time and memory; empty when that is one point or none."""
    points = _candidate_points(plan) + _baseline_points(plan)
    points.sort(key=lambda point: ("refused", "bound", "slower", "baseline", "chosen").index(point.kind))
    if len(points) < 2:
        return ""
    limit = plan.memory_limit / _GIB
    label = "Step time against memory of the plan, its rivals and the baselines"
    return charts.scatter(
        points, label, "memory of a device, GiB", "seconds a step", limit, f"limit {facts.headline(plan).limit}"
    )


def _candidate_points(plan: Plan) -> list[charts.Point]:
    points = []
    for row in facts.candidates(plan)[:MAX_CANDIDATES]:
        if row.seconds is None or row.bytes is None:
            continue
        kind = {"chosen": "chosen", "slower": "bound" if row.bound else "slower"}.get(row.status, "refused")
        title = f"{row.mesh}, micro-batch {row.micro_batch}: {row.step_time}, {row.memory}. {row.status}: {row.reason}"
        points.append(charts.Point(row.bytes / _GIB, row.seconds, kind, title, "this plan" if kind == "chosen" else ""))
    return points


def _baseline_points(plan: Plan) -> list[charts.Point]:
    return [
        charts.Point(base.memory / _GIB, base.step_time, "baseline", f"{row.name}: {row.step_time}, {row.memory}", row.name[:24])
        for base, row in zip(plan.baselines, facts.baselines(plan), strict=True)
        if base.step_time is not None and base.memory is not None
    ]
