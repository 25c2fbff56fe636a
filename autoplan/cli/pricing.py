"""The command that prices what is written: a plan after an edit, or the configuration of another trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from autoplan.cli import arguments, outputs, talk
from autoplan.cli.app import app
from autoplan.cli.arguments import Force, Json, Settings
from autoplan.errors import UsageError


@app.command(
    epilog="Examples:\n\nautoplan estimate plan.yaml\n\nautoplan estimate edited.yaml --model examples/llama.py\n\n"
    "autoplan estimate --from job.toml --model examples/llama.py --gpus 64\n\n"
    "autoplan estimate --from accelerate.yaml --model ./Llama-3.1-8B --global-batch 64 --micro-batch 2 -o plan.yaml"
)
def estimate(
    plan_file: Annotated[Path | None, typer.Argument(metavar="[PLAN.yaml]", help="A plan, perhaps edited by hand.")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="FILE", help="Instead of a plan: torchtitan's TOML, Megatron-LM's arguments, accelerate's YAML."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="Default: the model that the plan names.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, metavar="N", help="With --from, where the file does not say it.")] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="With --from: a profile of `autoplan hardware`, a YAML file, or auto.",
            autocompletion=arguments.hardware_completions,
        ),
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --from: samples of a step, before the file's.")
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --from: samples of a data-parallel group at a time, before the file's."),
    ] = None,
    settings: Settings = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the priced plan to this file.")] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Price a plan anew, as it is written; or what the configuration of another trainer makes of a model."""
    model_kwargs = arguments.settings(settings)
    if (plan_file is None) == (source is None):
        raise UsageError("a plan or --from a configuration is priced, one of them.", "Name plan.yaml, or --from job.toml.")
    if output is not None:
        outputs.check((output,), force)
    from autoplan import api
    from autoplan.report import compare

    if source is None:
        beside = {"--gpus": gpus, "--hardware": hardware, "--global-batch": global_batch, "--micro-batch": micro_batch}
        for option in (option for option, value in beside.items() if value is not None):
            raise UsageError(f"{option} goes with --from: a plan says it itself.", "Leave it away, or edit the plan.")
        assert plan_file is not None
        written = api.load_plan(plan_file)
        priced = replace(written, prediction=api.estimate(written, model, model_kwargs=model_kwargs))
        shown = compare.repriced(written, priced)
    else:
        if model is None:
            raise UsageError(f"{source} does not say which model it trains.", "Give --model model.py.")
        found = arguments.hardware_here(hardware)
        chosen: dict[str, Any] = {} if found is None else {"hardware": found}
        priced, lost = api.imported(
            source,
            model,
            gpus=gpus,
            global_batch=global_batch,
            micro_batch=micro_batch,
            model_kwargs=model_kwargs,
            **chosen,
        )
        for sentence in lost:
            talk.say("not expressed", sentence)
        talk.say("hardware", priced.hardware)
        shown = compare.priced(priced)
    if as_json:
        typer.echo(api.plan_json(priced))
    else:
        talk.show(shown)
    if output is not None:
        with outputs.atomically(output) as file:
            api.save_plan(priced, file)
        talk.say("wrote", str(output))
