"""Two to five plans side by side: what differs first, then what it costs. For the terminal, the page and programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from autoplan.plan import Plan
from autoplan.report import facts, pipeline, words
from autoplan.report.layers import reshard_words
from autoplan.report.tables import table, titled

Named = Sequence[tuple[str, Plan]]
"""(name of its file, plan) of every plan, in the order of the columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One property of all plans. `best` is the column of the best value, where there is one and it is not all of them."""

    label: str
    texts: tuple[str, ...]
    differs: bool
    best: int | None = None


def names(plans: Named) -> tuple[str, ...]:
    """What the columns are called: as short as still tells them apart."""
    short = [words.clean(name.rpartition("/")[2]) for name, _ in plans]
    full = [words.clean(name) for name, _ in plans]
    return tuple(full if len(set(short)) < len(short) else short)


def verdict(plans: Named) -> str:
    """Which is the fastest that fits, and by how much; then whether they were asked the same."""
    titles = names(plans)
    fits = [i for i, (_, plan) in enumerate(plans) if plan.prediction.memory.total <= plan.memory_limit]
    if not fits:
        return "None of the plans fits into its memory limit."
    rate = [plan.prediction.tokens_per_second for _, plan in plans]
    fastest = max(fits, key=lambda i: rate[i])
    others = [i for i in range(len(plans)) if i != fastest]
    clauses = []
    for i in others:
        if i not in fits:
            clauses.append(f"{titles[i]} does not fit")
            continue
        times = rate[fastest] / rate[i] if rate[i] else float("inf")
        same = words.factor(times) == words.factor(1.0)
        clauses.append(f"as fast as {titles[i]}" if same else f"{words.factor(times)} the speed of {titles[i]}")
    return f"{titles[fastest]} is the fastest that fits: {', '.join(clauses)}."


def caution(plans: Named) -> str:
    """What makes the comparison unfair; nothing if it is fair."""
    asked: tuple[tuple[str, Callable[[Plan], object]], ...] = (
        ("models", lambda plan: plan.graph),
        ("numbers of devices", lambda plan: plan.mesh.size),
        ("hardware", lambda plan: plan.hardware_fingerprint),
        ("workloads", lambda plan: (plan.workload, plan.tokens)),
    )
    unequal = [what for what, of in asked if len({of(plan) for _, plan in plans}) > 1]
    return f"They were not asked the same: {', '.join(unequal)} differ." if unequal else ""


def choices(plans: Named) -> tuple[Line, ...]:
    """What was decided."""
    return (
        _line("Model", plans, lambda plan: words.clean(plan.model)),
        _line("Hardware", plans, lambda plan: words.clean(plan.hardware)),
        _line("Global batch", plans, lambda plan: words.plural(plan.workload.global_batch, "sample")),
        _line("Devices", plans, lambda plan: words.count(plan.mesh.size)),
        _line("Mesh", plans, lambda plan: str(plan.mesh)),
        _line("Stages", plans, lambda plan: " | ".join(str(len(names)) for names in plan.stages) if plan.pipeline else "-"),
        _line("Schedule", plans, lambda plan: pipeline.schedule_words(plan.pipeline) if plan.pipeline else "-"),
        _line("Micro-batch", plans, lambda plan: f"{words.plural(plan.micro_batch, 'sample')} x {plan.micro_batches}"),
        _line("Recompute", plans, facts.recompute_clause),
        _line("ZeRO", plans, _zero),
        *([_line("Experts", plans, _experts)] if any(plan.mesh.ep > 1 for _, plan in plans) else []),
    )


def _experts(plan: Plan) -> str:
    dealt = dict.fromkeys(each for _, strategy in plan.layers() for each in strategy.sharding.experts)
    return words.experts_words(tuple(dealt), plan.mesh.ep) if plan.mesh.ep > 1 else "-"


def _zero(plan: Plan) -> str:
    return " and ".join(sorted({reshard_words(plan, strategy) for _, strategy in plan.layers()}))


def costs(plans: Named) -> tuple[Line, ...]:
    """What it should cost."""
    return (
        _line("Step time", plans, lambda plan: words.seconds(plan.prediction.step_time), lambda p: p.prediction.step_time),
        _line(
            "Tokens/s", plans, lambda plan: words.count(plan.prediction.tokens_per_second),
            lambda p: -p.prediction.tokens_per_second,
        ),
        _line("MFU", plans, lambda plan: words.percent(plan.prediction.mfu), lambda plan: -plan.prediction.mfu),
        _line(
            "Memory of the fullest device", plans, lambda plan: words.size(plan.prediction.memory.total),
            lambda plan: plan.prediction.memory.total,
        ),
        _line("Limit", plans, lambda plan: words.size(plan.memory_limit)),
        _line("Proof", plans, lambda plan: plan.solve.status),
    )  # fmt: skip


def _line(
    label: str, plans: Named, text: Callable[[Plan], str], value: Callable[[Plan], float] | None = None
) -> Line:  # fmt: skip
    texts = tuple(text(plan) for _, plan in plans)
    differs = len(set(texts)) > 1
    best = min(range(len(plans)), key=lambda i: value(plans[i][1])) if value and differs else None
    return Line(label=label, texts=texts, differs=differs, best=best)


def parts(plans: Named, of: Callable[[Plan], tuple[facts.Part, ...]]) -> tuple[Line, ...]:
    """The parts of a sum, those that are not zero everywhere."""
    columns = [of(plan) for _, plan in plans]
    return tuple(
        Line(label=row[0].label, texts=tuple(part.text for part in row), differs=len({part.text for part in row}) > 1)
        for row in zip(*columns, strict=True)
        if any(part.value for part in row)
    )


def summary(plans: Named) -> RenderableType:
    """Everything in a terminal; what is the same for all is said dimly."""
    said = [Text(verdict(plans), style="bold")]
    if caution(plans):
        said.append(Text(caution(plans), style="yellow"))
    sections = (
        ("What was decided", choices(plans)),
        ("What it should cost", costs(plans)),
        ("Where the step goes", parts(plans, facts.time_parts)),
        ("Memory of the fullest device", parts(plans, facts.memory_parts)),
    )
    return Group(*said, *(titled(title, _table(names(plans), lines)) for title, lines in sections))


def _table(columns: Sequence[str], lines: Sequence[Line]) -> RenderableType:
    made = table(("<", ""), *(("<", name) for name in columns))
    for line in lines:
        cells = [Text(text, style="green" if i == line.best else "") for i, text in enumerate(line.texts)]
        made.add_row(Text(line.label), *cells, style="" if line.differs else "dim")
    return made


def as_dicts(plans: Named) -> list[dict[str, Any]]:
    """One plain mapping for each plan, in bytes and seconds."""
    return [
        {
            "file": name,
            "model": plan.model,
            "hardware": plan.hardware,
            "mesh": asdict(plan.mesh),
            "micro_batch": plan.micro_batch,
            "micro_batches": plan.micro_batches,
            "schedule": plan.pipeline.schedule if plan.pipeline else None,
            "step_time_seconds": plan.prediction.step_time,
            "tokens_per_second": plan.prediction.tokens_per_second,
            "mfu": plan.prediction.mfu,
            "memory_bytes": plan.prediction.memory.total,
            "memory_limit_bytes": plan.memory_limit,
            "time_seconds": dict(plan.prediction.time.items()),
        }
        for name, plan in plans
    ]
