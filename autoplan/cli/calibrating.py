"""`autoplan calibrate`: which term of a prediction was wrong, and a profile that is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoplan.cli import arguments, outputs, talk
from autoplan.cli.app import app
from autoplan.cli.arguments import Force, Json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from autoplan.calibrate.calibration import Calibration


@app.command(
    epilog="Examples:\n\nautoplan calibrate plan.yaml --measured steps.json\n\n"
    "autoplan calibrate plan.yaml --measured steps.json -o my-calibrated.yaml\n\n"
    "autoplan calibrate a.yaml b.yaml --measured a.json --measured b.json --hardware my.yaml -o better.yaml"
)
def calibrate(
    plan_files: Annotated[list[Path], typer.Argument(metavar="PLAN.yaml...", help="Plans that were run.")],
    measured: Annotated[
        list[Path],
        typer.Option("--measured", metavar="STEPS.json", help="What autoplan.Timer wrote of each plan, in the same order."),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the corrected profile goes.")] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="The profile to correct. Default: the plan's.",
            autocompletion=arguments.hardware_completions,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Default: the model that each plan names.")
    ] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Compare measured steps with what a plan predicted: tell which term was wrong, write a profile that is right."""
    if output is not None:
        outputs.check((output,), force)
    from dataclasses import replace

    from autoplan import api
    from autoplan.files.hardware import dump_hardware
    from autoplan.files.measurements import load_steps

    plans = [api.load_plan(path) for path in plan_files]
    found = api.calibrate(plans, [load_steps(path) for path in measured], hardware=hardware, model=model)
    if as_json:
        typer.echo(json.dumps(as_dict(found), indent=2))
    else:
        talk.show(summary(found, [str(path) for path in plan_files]))
    if output is not None:
        outputs.write(output, dump_hardware(replace(found.profile, name=output.stem)))


def as_dict(found: Calibration) -> dict[str, Any]:
    """What was found as plain data, in seconds and bytes."""
    lines = [
        {"run": line.run, "what": line.what, "predicted": line.predicted, "measured": line.measured, "corrected": line.corrected}
        for line in (*found.times, *found.memory)
    ]
    return {"factors": dict(found.factors), "wrong": found.wrong, "extra_reserved": found.extra_reserved, "lines": lines}


def summary(found: Calibration, names: list[str]) -> RenderableType:
    """The verdict, the times beside each other, and what was corrected by how much."""
    from rich.console import Group
    from rich.text import Text

    from autoplan.calibrate.terms import TERMS
    from autoplan.report.tables import table, titled
    from autoplan.report.words import clean, seconds, size

    worst = found.factors[found.wrong]
    off = (
        f"took {worst:.2f} times as long as the profile said"
        if worst > 1
        else f"took {worst:.2f} of the time that the profile said"
    )
    right = all(abs(line.error) < 0.03 for line in found.times if line.what == "step")
    verdict = f"Furthest off: {TERMS[found.wrong]}, which {off}."
    parts: list[RenderableType] = [Text(("The prediction was right within 3 %. " if right else "") + verdict, style="bold")]
    for lines, said, title in ((found.times, seconds, "Times"), (found.memory, size, "Memory of the fullest rank")):
        if not lines:
            continue
        made = table(
            ("<", "run"), ("<", "what"), (">", "predicted"), (">", "measured"), (">", "error"), (">", "corrected"), (">", "left")
        )
        for line in lines:
            cells = clean(names[line.run]), line.what, said(line.predicted), said(line.measured), f"{line.error:+.1%}"
            made.add_row(*map(Text, (*cells, said(line.corrected), f"{line.left:+.1%}")))
        parts.append(titled(title, made))
    factors = table(("<", "term"), ("<", "what it is"), (">", "times as long"))
    for term, factor in found.factors.items():
        factors.add_row(term, TERMS[term], f"{factor:.3g}")
    return Group(*parts, titled("Corrections", factors))
