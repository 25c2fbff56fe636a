"""Two plans side by side in the terminal: one priced anew, or one with a wish beside the one that was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autoplan.plan import Plan
from autoplan.report import words
from autoplan.report.tables import table, titled


def repriced(written: Plan, priced: Plan) -> RenderableType:
    """What the plan says that it costs, and what it costs by the model as it is now."""
    said, now = written.prediction.step_time, priced.prediction.step_time
    change = now / said - 1 if said else 0.0
    verdict = (
        "as the plan says"
        if abs(change) < 1e-6
        else f"the plan says {words.seconds(said)}: {abs(change):.2%} "
        + ("slower than that" if change > 0 else "faster than that")
    )
    fits = priced.prediction.memory.total <= priced.memory_limit
    memory = f"{words.size(priced.prediction.memory.total)} of {words.size(priced.memory_limit)} a device"
    lines = [
        Text(f"{words.seconds(now)} a step, {verdict}.", style="bold"),
        Text(f"{memory}." if fits else f"{memory}: it does not fit.", style="" if fits else "red"),
    ]
    return Group(*lines, *_sections(written, priced, ("as written", "priced anew")))


def answer(plan: Plan, fixed: Mapping[str, int], other: Plan | None, reason: str) -> RenderableType:
    """Why the plan does not have the axes in `fixed`: the best plan that has them, or what forbids it."""
    wish = " ".join(f"{axis}={size}" for axis, size in fixed.items())
    if other is None:
        return Text(f"Why not {wish}? {words.clean(reason)}")
    slower = other.prediction.step_time / plan.prediction.step_time - 1
    if slower < 1e-6:
        return Text(f"Why not {wish}? The plan has it already, or costs the same without: {other.mesh}.")
    took = words.seconds(other.prediction.step_time)
    line = f"Why not {wish}? Its best plan, {other.mesh}, takes {took} a step: {slower:.1%} slower."
    return Group(Text(line, style="bold"), *_sections(plan, other, ("the plan", f"with {wish}")))


def _sections(one: Plan, two: Plan, names: tuple[str, str]) -> Iterable[RenderableType]:
    times = zip(one.prediction.time.items(), two.prediction.time.items(), strict=True)
    sizes = zip(one.prediction.memory.items(), two.prediction.memory.items(), strict=True)
    time_rows = [(words.TIME_WORDS[name][0], words.seconds(a), words.seconds(b)) for (name, a), (_, b) in times if a or b]
    size_rows = [(words.MEMORY_WORDS[name][0], words.size(a), words.size(b)) for (name, a), (_, b) in sizes if a or b]
    together = words.seconds(one.prediction.step_time), words.seconds(two.prediction.step_time)
    yield titled("Where the step goes", _table(names, [*time_rows, ("Together", *together)]))
    peak = words.size(one.prediction.memory.total), words.size(two.prediction.memory.total)
    yield titled("Memory of the fullest device", _table(names, [*size_rows, ("Together", *peak)]))


def _table(names: tuple[str, str], rows: Iterable[tuple[str, str, str]]) -> Table:
    made = table(("<", "part"), (">", names[0]), (">", names[1]))
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
