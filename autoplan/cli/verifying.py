"""`autoplan verify`: does a plan run, and send and hold what it says?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoplan.cli import talk
from autoplan.cli.app import app
from autoplan.cli.arguments import Json, PlanFile

if TYPE_CHECKING:
    from rich.console import RenderableType

    from autoplan.verify import DryRun
    from autoplan.verify.parity import Parity


@app.command(
    epilog="Examples:\n\nautoplan verify plan.yaml\n\nautoplan verify plan.yaml model.py\n\nautoplan verify plan.yaml --json\n\n"
    "autoplan verify plan.yaml 'model.py?layers=4' --ranks 4"
)
def verify(
    plan_file: PlanFile,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Default: the model that the plan names.")] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Train three steps on so many processes here too, as many as the plan has devices."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a step of every pipeline rank of the plan here, one at a time, without GPUs or other processes.

    Count what each would send and measure its memory, and compare both with the plan. Exit code 1 if something differs.
    """
    from autoplan import api

    plan = api.load_plan(plan_file)
    if ranks is not None:
        from autoplan.verify.parity import check_ranks, parity

        check_ranks(plan, ranks)
    found = api.verify(plan, model)
    trained = None if ranks is None else parity(plan, model or plan.model, ranks)
    if as_json:
        typer.echo(json.dumps(as_dict(found) | ({"parity": asdict(trained)} if trained else {}), indent=2))
    else:
        talk.show(summary(found))
        if trained:
            talk.show(parity_words(trained))
    if not found.agrees or (trained is not None and not trained.agrees):
        raise typer.Exit(1)


def as_dict(found: DryRun) -> dict[str, Any]:
    """All that was found as plain data, in bytes."""
    return {
        "agrees": found.agrees,
        "differences": list(found.differences),
        "not_checked": list(found.notes),
        "ran": found.ran,
        "collectives": [
            {
                "rank": row.rank,
                "axis": row.axis,
                "collective": row.kind,
                "predicted": {"count": row.expected.count, "bytes": row.expected.bytes},
                "seen": {"count": row.seen.count, "bytes": row.seen.bytes},
            }
            for row in found.rows
        ],
        "memory": [{"rank": each.rank, "predicted": each.predicted, "seen": each.measured} for each in found.memory],
    }


def summary(found: DryRun) -> RenderableType:
    """The verdict, the tables, and each difference in words."""
    from rich.console import Group
    from rich.text import Text

    from autoplan.report.tables import titled
    from autoplan.report.words import clean

    verdict = "The plan runs, and does what it says." if found.agrees else "The plan differs from what it says."
    if found.notes and found.agrees:
        verdict = "What was checked of the plan does what it says."
    parts: list[RenderableType] = [Text(verdict, style="bold green" if found.agrees else "bold red")]
    if found.ran:
        parts.append(Text(f"{found.ran[0].upper()}{found.ran[1:]}.", style="dim"))
    if found.differences:
        parts.append(titled("Differences", Text("\n".join(map(clean, found.differences)))))
    if found.rows:
        parts.append(titled("Sent in a step, of each pipeline rank", _collectives(found)))
    if found.memory:
        parts.append(titled("Peak memory, of each pipeline rank", _memory(found)))
    return Group(*parts, *(Text(f"\nNot checked: {clean(note)}", style="yellow") for note in found.notes))


def parity_words(found: Parity) -> RenderableType:
    """How far the parallel model is from the single process."""
    from rich.text import Text

    from autoplan.report.tables import titled
    from autoplan.report.words import clean

    verdict = "equal those of one process" if found.agrees else f"differ from those of one process, most at {clean(found.worst)}"
    numbers = f"losses to {found.loss:.1e}, gradients to {found.gradients:.1e}, parameters to {found.parameters:.1e}"
    return titled("Trained", Text(f"Three steps on {found.ranks} processes {verdict}: {numbers}."))


def _collectives(found: DryRun) -> RenderableType:
    from rich.text import Text

    from autoplan.report.tables import table
    from autoplan.report.words import size

    made = table((">", "rank"), ("<", "axis"), ("<", "collective"), (">", "predicted"), (">", "seen"), (">", "bytes"), ("<", ""))
    for row in found.rows:
        sizes = (
            size(row.seen.bytes)
            if row.expected.bytes == row.seen.bytes
            else f"{size(row.expected.bytes)} / {size(row.seen.bytes)}"
        )
        mark = Text("ok", style="green") if row.agrees else Text("differs", style="red")
        cells = (str(row.rank), row.axis, row.kind, str(row.expected.count), str(row.seen.count), sizes)
        made.add_row(*map(Text, cells), mark)
    return made


def _memory(found: DryRun) -> RenderableType:
    from rich.text import Text

    from autoplan.report.tables import table
    from autoplan.report.words import size

    made = table((">", "rank"), (">", "predicted"), (">", "seen"), (">", "predicted too much"), ("<", ""))
    for each in found.memory:
        mark = Text("ok", style="green") if each.agrees else Text("too little", style="red")
        cells = (str(each.rank), size(each.predicted), size(each.measured), f"{each.over:.1%}")
        made.add_row(*map(Text, cells), mark)
    return made
