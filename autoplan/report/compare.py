"""Prices in the terminal: a plan priced anew, one with a wish beside the chosen one, or what another trainer's file costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autoplan.plan import Plan
from autoplan.report import words
from autoplan.report.tables import table, titled

SAME = 1.5e-4
"""Steps that differ by less are as long: both are known within a gap."""


def repriced(written: Plan, priced: Plan) -> RenderableType:
    """What the plan says that it costs, and what it costs by the model as it is now."""
    said, now = written.prediction.step_time, priced.prediction.step_time
    change = now / said - 1 if said else 0.0
    verdict = (
        "as the plan says"
        if abs(change) < 1e-6
        else f"the plan says {words.seconds(said)}: {words.percent(abs(change))} "
        + ("slower than that" if change > 0 else "faster than that")
    )
    line = Text(f"{words.seconds(now)} a step, {verdict}.", style="bold")
    return Group(line, _memory(priced), *_sections({"as written": written, "priced anew": priced}))


def priced(plan: Plan) -> RenderableType:
    """What a configuration costs that somebody wrote by hand."""
    batches = f"{words.plural(plan.micro_batches, 'micro-batch')} of {words.plural(plan.micro_batch, 'sample')}"
    parts = [f"{plan.mesh} over {words.plural(plan.mesh.size, 'device')}", batches]
    if plan.pipeline:
        each = f" with {plan.pipeline.chunks} chunks a rank" if plan.pipeline.chunks > 1 else ""
        parts.append(f"{plan.pipeline.schedule}{each}")
    now = plan.prediction
    rate = f"{now.tokens_per_second:,.0f} tokens/s, MFU {now.mfu:.1%}".replace("%", " %")
    return Group(
        Text(f"{words.seconds(now.step_time)} a step: {', '.join(parts)}.", style="bold"),
        Text(f"{rate}."),
        _memory(plan),
        *_sections({"priced": plan}),
    )


def _memory(plan: Plan) -> Text:
    needed = plan.prediction.memory.total
    told = f"{words.size(needed)} of {words.size(plan.memory_limit)} a device"
    fits = needed <= plan.memory_limit
    return Text(f"{told}." if fits else f"{told}: it does not fit.", style="" if fits else "red")


def answer(plan: Plan, asked: Mapping[str, int | str], other: Plan | None, reason: str, kept: bool = False) -> RenderableType:
    """Why the plan does not do what is `asked`: the best plan that does, or what forbids it. `kept`: it does."""
    wish = " ".join(f"{what}={value}" for what, value in asked.items())
    if other is None:
        return Text(f"Why not {wish}? {words.clean(_sentence(reason))}")
    slower = other.prediction.step_time / plan.prediction.step_time - 1
    if kept and abs(slower) < SAME:
        return Text(f"Why not {wish}? The plan has it already: {plan.mesh}.")
    took = f"Its best plan, {other.mesh}, takes {words.seconds(other.prediction.step_time)} a step"
    if slower < -SAME:
        line = f"{took}: {words.percent(-slower)} faster. The plan at hand was made under other wishes, or edited."
    elif slower < SAME:
        line = f"{took}, as long as the plan."
    else:
        line = f"{took}: {words.percent(slower)} slower."
    return Group(Text(f"Why not {wish}? {line}", style="bold"), *_sections({"the plan": plan, f"with {wish}": other}))


def _sentence(reason: str) -> str:
    return reason if reason.endswith(".") else f"{reason}."


def _sections(plans: Mapping[str, Plan]) -> Iterable[RenderableType]:
    """Times and sizes of plans by the names of their columns."""
    times = [dict(plan.prediction.time.items()) for plan in plans.values()]
    sizes = [dict(plan.prediction.memory.items()) for plan in plans.values()]
    yield titled("Where the step goes", _table(plans, times, words.TIME_WORDS, words.seconds))
    yield titled("Memory of the fullest device", _table(plans, sizes, words.MEMORY_WORDS, words.size))


def _table(
    names: Iterable[str],
    columns: Sequence[Mapping[str, float]],
    labels: Mapping[str, tuple[str, str]],
    shown: Callable[[float], str],
) -> Table:
    made = table(("<", "part"), *((">", name) for name in names))
    for name in columns[0]:
        if any(column[name] for column in columns):
            made.add_row(Text(labels[name][0]), *(Text(shown(column[name])) for column in columns))
    made.add_row(Text("Together"), *(Text(shown(sum(column.values()))) for column in columns))
    return made
