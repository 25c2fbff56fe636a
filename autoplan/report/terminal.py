"""A plan in a terminal: the answer first, then why, then what to do next. Fits 80 columns; rich minds NO_COLOR and pipes.

Texts are `rich.text.Text`, never markup: a layer may be called "[red]".
"""

from __future__ import annotations

import io

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from autoplan.plan import CandidateStatus, Plan
from autoplan.report import facts, frontier, layers, pipeline
from autoplan.report.tables import table, titled

TOP = 6
"""Candidates that are shown; the page shows all."""

_BAR = 20
_STATUS_STYLE: dict[CandidateStatus, str] = {"chosen": "green", "slower": "", "out of memory": "red", "illegal": "dim"}


def summary(plan: Plan, path: str = "plan.yaml") -> RenderableType:
    """Everything that a person at a terminal wants to know of the plan, which lies in the file `path`."""
    sections = [
        _answer(plan),
        titled("Layers", _layers(plan)),
        *(titled(f"Sharding of {card.used_by}", _modules(card)) for card in layers.cards(plan) if card.modules),
        *([titled("Pipeline", _ranks(plan))] if pipeline.ranks(plan) else []),
        titled("Memory of the fullest device", _memory(plan)),
        titled("Where the step goes", _time(plan)),
    ]
    if plan.baselines:
        sections.append(titled("Against plans written by hand", _baselines(plan)))
    if plan.frontier:
        sections.append(titled("With less memory", _frontier(plan)))
    if plan.candidates:
        sections.append(titled("What else was looked at", _candidates(plan)))
    sections += [Text(f"warning: {warning}", style="yellow") for warning in facts.warnings(plan)]
    sections.append(titled("Next", _commands(plan, path)))
    return Group(*sections)


def plain_text(plan: Plan, path: str = "plan.yaml", width: int = 80) -> str:
    """The summary as text without colours, for a file."""
    out = io.StringIO()
    Console(file=out, width=width, no_color=True, highlight=False).print(summary(plan, path))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _answer(plan: Plan) -> RenderableType:
    head = facts.headline(plan)
    lines = [
        Text(head.answer, style="bold"),
        Text(f"{head.throughput} tokens/s, MFU {head.mfu}, {head.memory} of {head.limit} a device ({head.headroom})."),
    ]
    if plan.pipeline:
        lines.append(Text(f"{pipeline.stages_line(plan)}."))
    speedups = facts.speedups(plan)
    lines.append(
        Text(f"{speedups}." if speedups else f"No speed-up to show: {head.speedup_over}.", style="" if speedups else "dim")
    )
    lines.append(Text(head.proof, style="green" if plan.solve.status == "optimal" else "dim"))
    return Group(*lines)


def _add(rows: Table, *cells: str | int, style: str = "") -> None:
    rows.add_row(*(Text(str(cell)) for cell in cells), style=style)


def _layers(plan: Plan) -> Table:
    dealt = plan.mesh.ep > 1
    split = [*([("<", "over tp")] if plan.mesh.tp > 1 or not dealt else []), *([("<", "experts")] if dealt else [])]
    rows = table(("<", "layers"), (">", "number"), ("<", "strategy"), ("<", "recompute"), *split, ("<", "FSDP"))
    for row in layers.runs(plan):
        over = [*([row.sharding] if plan.mesh.tp > 1 or not dealt else []), *([row.dealt] if dealt else [])]
        _add(rows, row.layers, len(row.names) or "", row.strategy, row.recompute, *over, row.reshard)
    return rows


def _modules(card: layers.ShardingCard) -> Table:
    rows = table(("<", "module"), ("<", "what"), ("<", "placement"), ("<", "which is"))
    for module in card.modules:
        first = module.name
        for border in module.enter:
            _add(rows, first, f"in {border.leaf}", f"{border.source} -> {border.target}", border.words)
            first = ""
        for weight in module.weights:
            _add(rows, first, weight.names, weight.layout, weight.words)
            first = ""
        for border in module.leave:
            _add(rows, first, f"out {border.leaf}", f"{border.source} -> {border.target}", border.words)
            first = ""
    return rows


def _parts(parts: tuple[facts.Part, ...], total: str) -> Table:
    rows = table(("<", "part"), (">", "size"), (">", "share"), ("<", ""))
    for part in parts:
        if part.value:
            _add(rows, part.label, part.text, f"{part.share:.0%}".replace("%", " %"), "#" * round(part.share * _BAR))
    _add(rows, "Together", total, "", "", style="bold")
    return rows


def _ranks(plan: Plan) -> RenderableType:
    ranks = pipeline.ranks(plan)
    late = any(row.later for row in ranks)
    apart = [(">", "later")] if late else []
    rows = table(
        ("<", "rank"), ("<", "layers"), (">", "forward"), (">", "backward"), *apart, (">", "idle"), (">", "memory"), (">", "free")
    )
    for row in ranks:
        later = [row.later] if late else []
        _add(rows, f"pp {row.rank}", row.layers, row.forward, row.backward, *later, row.idle, row.memory, row.free)
    said = ", later of backward" if late else ""
    return Group(rows, Text(f"Times of one micro-batch; idle is a share of the schedule{said}.", style="dim"))


def _memory(plan: Plan) -> RenderableType:
    return _with_words(_parts(facts.memory_parts(plan), facts.headline(plan).memory), facts.allocated(plan))


def _time(plan: Plan) -> RenderableType:
    return _with_words(_parts(facts.time_parts(plan), facts.headline(plan).step_time), facts.simulated(plan))


def _with_words(parts: Table, said: str) -> RenderableType:
    return Group(parts, Text(said, style="dim")) if said else parts


def _baselines(plan: Plan) -> Table:
    rows = table(("<", "baseline"), ("<", "mesh"), (">", "step"), (">", "memory"), (">", "plan is"), ("<", "why not"))
    for row in facts.baselines(plan):
        why_not = row.note if row.speedup is None else ""
        _add(rows, row.name, row.mesh, row.step_time, row.memory, row.verdict, why_not, style="dim" if why_not else "")
    return rows


def _frontier(plan: Plan) -> RenderableType:
    found = table(("<", "mesh"), ("<", "recompute"), (">", "step"), (">", "slower"), (">", "memory"), (">", "head-room"))
    for row in frontier.rows(plan):
        mesh = f"{row.mesh}, {row.schedule}" if row.schedule else row.mesh
        style = "green" if row.chosen else ""
        _add(found, mesh, row.recompute, row.step_time, row.slower, row.memory, row.headroom, style=style)
    return Group(found, Text("Each is the fastest that fits; --memory-headroom with the last column gives it.", style="dim"))


def _candidates(plan: Plan) -> RenderableType:
    rows = table(("<", "mesh"), (">", "samples"), (">", "step"), (">", "memory"), ("<", "why"))
    for row in _top(facts.candidates(plan)):
        mesh = f"{row.mesh}, {row.schedule}" if row.schedule else row.mesh
        _add(rows, mesh, row.micro_batch, row.step_time, row.memory, _why(row), style=_STATUS_STYLE[row.status])
    counts = ", ".join(f"{number} {status}" for status, number in facts.candidate_counts(plan))
    return Group(rows, Text(f"{counts}. All of them with their reasons are in the HTML report.", style="dim"))


def _why(row: facts.CandidateRow) -> str:
    """Without the time that begins the reason of a slower one: it stands in its own column."""
    if row.status == "slower":
        return row.reason.partition(", ")[2] or row.reason
    return {"chosen": "chosen", "illegal": f"illegal: {row.reason}"}.get(row.status, row.reason)


def _top(rows: tuple[facts.CandidateRow, ...]) -> list[facts.CandidateRow]:
    """The best few, and of those that cannot run the first of each kind: the why-nots that people ask for."""
    running = [row for row in rows if row.status in ("chosen", "slower")]
    refused = [next((row for row in rows if row.status == status), None) for status in ("out of memory", "illegal")]
    return running[:TOP] + [row for row in refused if row is not None]


def _commands(plan: Plan, path: str) -> RenderableType:
    lines = [
        line
        for command in facts.commands(plan, path)
        for line in (Text(f"# {command.note}", style="dim"), Text(command.text, style="bold", overflow="ignore", no_wrap=True))
    ]
    return Group(*lines)
