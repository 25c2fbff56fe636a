"""A plan in a terminal: the answer first, then why, then what to do next. Fits 80 columns; rich minds NO_COLOR and pipes.

Texts are `rich.text.Text`, never markup: a layer may be called "[red]".
"""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autoplan.plan import CandidateStatus, Plan
from autoplan.report import facts, layers

TOP = 6
"""Candidates that are shown; the page shows all."""

_BAR = 20
_STATUS_STYLE: dict[CandidateStatus, str] = {"chosen": "green", "slower": "", "out of memory": "red", "illegal": "dim"}


def summary(plan: Plan) -> RenderableType:
    """Everything that a person at a terminal wants to know of the plan."""
    sections = [
        _answer(plan),
        _titled("Layers", _layers(plan)),
        *(_titled(f"Sharding of {card.used_by}", _modules(card)) for card in layers.cards(plan) if card.modules),
        _titled("Memory of the fullest device", _parts(facts.memory_parts(plan), facts.headline(plan).memory)),
        _titled("Where the step goes", _parts(facts.time_parts(plan), facts.headline(plan).step_time)),
    ]
    if plan.baselines:
        sections.append(_titled("Against plans written by hand", _baselines(plan)))
    if plan.candidates:
        sections.append(_titled("What else was looked at", _candidates(plan)))
    sections += [Text(f"warning: {warning}", style="yellow") for warning in facts.warnings(plan)]
    sections.append(_titled("Next", _commands(plan)))
    return Group(*sections)


def _answer(plan: Plan) -> RenderableType:
    head = facts.headline(plan)
    lines = [
        Text(head.answer, style="bold"),
        Text(f"{head.throughput} tokens/s, MFU {head.mfu}, {head.memory} of {head.limit} a device ({head.headroom})."),
    ]
    speedups = facts.speedups(plan)
    lines.append(Text(f"{speedups}." if speedups else f"No speed-up to show: {head.speedup_over}.", style="" if speedups else "dim"))
    lines.append(Text(head.proof, style="green" if plan.solve.status == "optimal" else "dim"))
    return Group(*lines)


def _titled(title: str, body: RenderableType) -> RenderableType:
    return Group(Text(""), Text(title, style="bold cyan"), Padding(body, (0, 0, 0, 2)))


def _table(*columns: tuple[str, str]) -> Table:
    """A table without lines; the sign before a column's name says where it stands: "<" left, ">" right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for side, name in columns:
        table.add_column(name, justify="right" if side == ">" else "left", overflow="fold", no_wrap=side == ">")
    return table


def _add(table: Table, *cells: str | int, style: str = "") -> None:
    table.add_row(*(Text(str(cell)) for cell in cells), style=style)


def _layers(plan: Plan) -> Table:
    table = _table(("<", "layers"), (">", "number"), ("<", "strategy"), ("<", "recompute"), ("<", "over tp"), ("<", "FSDP"))
    for row in layers.runs(plan):
        _add(table, row.layers, len(row.names) or "", row.strategy, row.recompute, row.sharding, row.reshard)
    return table


def _modules(card: layers.ShardingCard) -> Table:
    table = _table(("<", "module"), ("<", "what"), ("<", "placement"), ("<", "which is"))
    for module in card.modules:
        first = module.name
        for border in module.enter:
            _add(table, first, f"in {border.leaf}", f"{border.source} -> {border.target}", border.words)
            first = ""
        for weight in module.weights:
            _add(table, first, weight.names, weight.layout, weight.words)
            first = ""
        for border in module.leave:
            _add(table, first, f"out {border.leaf}", f"{border.source} -> {border.target}", border.words)
            first = ""
    return table


def _parts(parts: tuple[facts.Part, ...], total: str) -> Table:
    table = _table(("<", "part"), (">", "size"), (">", "share"), ("<", ""))
    for part in parts:
        if part.value:
            _add(table, part.label, part.text, f"{part.share:.0%}".replace("%", " %"), "#" * round(part.share * _BAR))
    _add(table, "Together", total, "", "", style="bold")
    return table


def _baselines(plan: Plan) -> Table:
    table = _table(("<", "baseline"), ("<", "mesh"), (">", "step"), (">", "memory"), (">", "plan is"), ("<", "why not"))
    for row in facts.baselines(plan):
        why_not = row.note if row.speedup is None else ""
        _add(table, row.name, row.mesh, row.step_time, row.memory, row.verdict, why_not, style="dim" if why_not else "")
    return table


def _candidates(plan: Plan) -> RenderableType:
    table = _table(("<", "mesh"), (">", "samples"), (">", "step"), (">", "memory"), ("<", "why"))
    rows = facts.candidates(plan)
    for row in _top(rows):
        _add(table, row.mesh, row.micro_batch, row.step_time, row.memory, _why(row), style=_STATUS_STYLE[row.status])
    counts = ", ".join(f"{number} {status}" for status, number in facts.candidate_counts(plan))
    return Group(table, Text(f"{counts}. All of them with their reasons are in the HTML report.", style="dim"))


def _why(row: facts.CandidateRow) -> str:
    return {"chosen": "chosen", "illegal": f"illegal: {row.reason}"}.get(row.status, row.reason)


def _top(rows: tuple[facts.CandidateRow, ...]) -> list[facts.CandidateRow]:
    """The best few, and of those that cannot run the first of each kind: the why-nots that people ask for."""
    running = [row for row in rows if row.status in ("chosen", "slower")]
    refused = [next((row for row in rows if row.status == status), None) for status in ("out of memory", "illegal")]
    return running[:TOP] + [row for row in refused if row is not None]


def _commands(plan: Plan) -> RenderableType:
    lines = [
        line
        for command in facts.commands(plan)
        for line in (Text(f"# {command.note}", style="dim"), Text(command.text, style="bold", overflow="ignore", no_wrap=True))
    ]
    return Group(*lines)
