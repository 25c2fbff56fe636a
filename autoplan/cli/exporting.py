"""Commands that carry a plan, or what a plan is, to other programs: export, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from autoplan.cli import outputs, talk
from autoplan.cli.app import app
from autoplan.cli.arguments import Force, Json, PlanFile


def _targets(incomplete: str) -> list[str]:
    from autoplan.export.targets import TARGETS

    return [name for name in TARGETS if name.startswith(incomplete)]


@app.command(
    epilog="Examples:\n\nautoplan export plan.yaml --to torchtitan\n\n"
    "autoplan export plan.yaml --to megatron -o plan-args.sh\n\nautoplan export plan.yaml --to deepspeed -o ds_config.json"
)
def export(
    plan_file: PlanFile,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="TRAINER",
            help="torchtitan, torchtitan-toml, megatron, megatron-bridge, deepspeed, accelerate, transformers or lightning.",
            autocompletion=_targets,
        ),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file, instead of stdout.")] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Write a plan as the configuration of another trainer. What that cannot express is said in it and on stderr."""
    if output is not None:
        outputs.check((output,), force)
    from autoplan import api

    made = api.export(api.load_plan(plan_file), to)
    for sentence in made.lost:
        talk.say("not expressed", sentence)
    if as_json:
        typer.echo(json.dumps({"to": to, "filename": made.filename, "text": made.text, "not_expressed": made.lost}, indent=2))
    elif output is None:
        typer.echo(made.text, nl=False)
    if output is not None:
        outputs.write(output, made.text)


@app.command(epilog="Examples:\n\nautoplan schema\n\nautoplan schema -o plan.schema.json")
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file, instead of stdout.")] = None,
    force: Force = False,
) -> None:
    """Print the JSON schema of plan.yaml, which is that of `plan --json` too."""
    if output is not None:
        outputs.check((output,), force)
    from autoplan.files.plan_document import plan_schema

    text = json.dumps(plan_schema(), indent=2)
    if output is None:
        typer.echo(text)
    else:
        outputs.write(output, text + "\n")
