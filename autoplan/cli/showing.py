"""Commands that show: inspect, report, compare, hardware."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from autoplan.cli import arguments, outputs, talk
from autoplan.cli.app import app
from autoplan.cli.arguments import Force, Json, Model, Open, PlanFile, Settings
from autoplan.errors import UsageError
from autoplan.plan import Plan


@app.command(
    epilog="Examples:\n\nautoplan inspect model.py\n\nautoplan inspect model.py --set size=70B --dtype float32\n\n"
    "autoplan inspect model.py --json\n\nautoplan inspect 'path/config.json?seq_len=2048' --fx"
)
def inspect(
    model: Model,
    dtype: Annotated[str, typer.Option(help="Number format of the computation.")] = "bfloat16",
    settings: Settings = None,
    as_json: Json = False,
    fx: Annotated[bool, typer.Option("--fx", help="The model as torch.fx graphs instead, as Python code.")] = False,
) -> None:
    """Show what autoplan sees in MODEL: layers, operations, FLOPs, bytes. Nothing is allocated."""
    from autoplan import api
    from autoplan.report.inspect import as_dict, summary

    if fx:
        from autoplan.capture.fx import readable

        typer.echo(readable(api.load_model(model, **arguments.settings(settings)), compute_dtype=dtype))
        return
    graph = api.inspect(api.load_model(model, **arguments.settings(settings)), compute_dtype=dtype)
    if as_json:
        typer.echo(json.dumps(as_dict(graph), indent=2))
    else:
        talk.show(summary(graph))


class Format(StrEnum):
    """What `report` makes."""

    html = "html"
    terminal = "terminal"
    csv = "csv"
    json = "json"
    trace = "trace"


ENDINGS = (
    (".trace.json", Format.trace),
    (".trace", Format.trace),
    (".html", Format.html),
    (".htm", Format.html),
    (".csv", Format.csv),
    (".json", Format.json),
    (".txt", Format.terminal),
)
"""What a file's name says about its format."""


@app.command(
    epilog="Examples:\n\nautoplan report plan.yaml\n\nautoplan report plan.yaml -o plan.html --force --open\n\n"
    "autoplan report plan.yaml --format terminal\n\nautoplan report plan.yaml -o candidates.csv\n\n"
    "autoplan report plan.yaml -o step.trace.json"
)
def report(
    plan_file: PlanFile,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where it goes; the name's ending tells the format. A page goes to report.html."),
    ] = None,
    kind: Annotated[
        Format | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="html, a page; terminal, text; csv, the candidates; json, the whole plan; or trace, the predicted step for "
            "ui.perfetto.dev.",
        ),
    ] = None,
    force: Force = False,
    open_page: Open = False,
) -> None:
    """Show a plan again: as one HTML page that needs no network, in the terminal, or as data."""
    kind = kind or _format(output)
    if kind is Format.html and output is None:
        output = Path("report.html")
    if open_page and kind is not Format.html:
        raise UsageError("--open shows a page only.", "Leave it out, or ask for --format html.")
    if output is not None:
        outputs.check((output,), force)
    from autoplan import api

    found = api.load_plan(plan_file)
    if output is None and kind is Format.terminal:
        from autoplan.report.terminal import summary

        talk.show(summary(found, str(plan_file)))
        return
    text = _text(found, kind, str(plan_file))
    if output is None:
        typer.echo(text, nl=not text.endswith("\n"))
        return
    outputs.write(output, text)
    if open_page:
        outputs.open_in_browser(output)


def _format(output: Path | None) -> Format:
    if output is None:
        return Format.html
    found = next((kind for ending, kind in ENDINGS if output.name.lower().endswith(ending)), None)
    if found is None:
        raise UsageError(
            f"'{output}' has none of the endings {', '.join(ending for ending, _ in ENDINGS)}.", "Say what it is with --format."
        )
    return found


def _text(found: Plan, kind: Format, path: str) -> str:
    from autoplan import api

    if kind is Format.csv:
        from autoplan.report.rows import csv_text

        return csv_text(found)
    if kind is Format.trace:
        from autoplan.report.trace import trace_json

        return trace_json(found)
    if kind is Format.terminal:
        from autoplan.report.terminal import plain_text

        return plain_text(found, path)
    return api.report(found) if kind is Format.html else api.plan_json(found) + "\n"


@app.command(
    epilog="Examples:\n\nautoplan compare a.yaml b.yaml\n\nautoplan compare a.yaml b.yaml c.yaml -o compare.html --open\n\n"
    "autoplan compare a.yaml b.yaml --json"
)
def compare(
    plan_files: Annotated[list[Path], typer.Argument(metavar="PLAN.yaml...", help="Two to five plans.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where an HTML page goes.")] = None,
    as_json: Json = False,
    force: Force = False,
    open_page: Open = False,
) -> None:
    """Show two to five plans side by side: what is different, and what it costs."""
    if not 2 <= len(plan_files) <= 5:
        raise UsageError(f"{len(plan_files)} plans cannot stand side by side.", "Name two to five.")
    if open_page and output is None:
        raise UsageError("--open needs a page to show.", "Add -o compare.html.")
    if output is not None:
        outputs.check((output,), force)
    from autoplan import api
    from autoplan.report import versus

    plans = [(str(path), api.load_plan(path)) for path in plan_files]
    if as_json:
        typer.echo(json.dumps(versus.as_dicts(plans), indent=2))
    elif output is None:
        talk.show(versus.summary(plans))
    if output is not None:
        outputs.write(output, api.compare(plans))
        if open_page:
            outputs.open_in_browser(output)


@app.command(epilog="Examples:\n\nautoplan hardware\n\nautoplan hardware h100-sxm-8x\n\nautoplan hardware --json")
def hardware(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="One profile, with the source of its numbers.",
            autocompletion=arguments.hardware_completions,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the machines that autoplan knows, or show one of them."""
    from autoplan import api
    from autoplan.report import machines

    profiles = [api.load_hardware(each) for each in ([name] if name else api.hardware_names())]
    if as_json:
        typer.echo(json.dumps(machines.as_dicts(profiles), indent=2))
    else:
        talk.show(machines.details(profiles[0]) if name else machines.catalog(profiles))
