"""`autoplan tune`: the best candidates on the real ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoplan.cli import arguments, outputs, talk
from autoplan.cli.app import app
from autoplan.cli.arguments import Force, Json, Model, Settings
from autoplan.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from autoplan.tune.tuner import Tuned


@app.command(
    epilog="Examples:\n\ntorchrun --nproc-per-node 8 -m autoplan tune model.py --top 3 --steps 20\n\n"
    "autoplan tune model.py --ranks 2 --hardware my.yaml -o plan.yaml"
)
def tune(
    model: Model,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="So many plans, each on another mesh.")] = 3,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="So many steps of each, after a warm-up.")] = 20,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Without torchrun: processes to start here. Default: all GPUs, or one a core."),
    ] = None,
    hardware: Annotated[
        str,
        typer.Option(metavar="NAME|FILE", help="The profile that predicts.", autocompletion=arguments.hardware_completions),
    ] = "auto",
    global_batch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Samples of one optimizer step, over all devices.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the fastest plan goes.")] = Path("plan.yaml"),
    settings: Settings = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Run the plans that are predicted to be fastest for a few steps each on the real ranks; write the one that is."""
    arguments.settings(settings)
    if _first():
        outputs.check((output,), force)
    from autoplan.profile.ranks import ranks_here, start

    wanted: dict[str, Any] = {
        "model": model, "top": top, "steps": steps, "hardware": hardware, "global_batch": global_batch, "output": str(output),
        "settings": settings, "as_json": as_json, "quiet": talk.volume.quiet,
    }  # fmt: skip
    if "WORLD_SIZE" in os.environ:
        _tune(wanted)
    else:
        start(ranks or ranks_here(), _tune, wanted)


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _tune(wanted: dict[str, Any]) -> None:
    """On every rank: the first one plans, all run, the first one writes."""
    import torch.distributed as dist

    from autoplan import api
    from autoplan.files.workload import workload
    from autoplan.profile.ranks import joined, this_device
    from autoplan.tune.tuner import as_dicts, candidates
    from autoplan.tune.tuner import tune as run

    talk.volume.quiet = wanted["quiet"]
    loaded = api.load_model(wanted["model"], **arguments.settings(wanted["settings"]))
    device = this_device()
    with joined(device):
        if not dist.is_initialized():
            raise UsageError("one process alone has nothing to tune.", "Start it with torchrun, or give --ranks 2.")
        plans = []
        if _first():
            load = workload(loaded.workload, {"global_batch": wanted["global_batch"]}, dist.get_world_size())
            profile = api.load_hardware(arguments.hardware_here(wanted["hardware"]) or "auto")
            graph = api.inspect(loaded, compute_dtype=load.compute_dtype)
            plans = list(candidates(graph, profile, load, dist.get_world_size(), wanted["top"]))
        found = run(
            plans, loaded, steps=wanted["steps"], device=device, tell=lambda what: talk.say("running", what) if _first() else None
        )
    if not _first():
        return
    output = Path(wanted["output"])
    with outputs.atomically(output) as file:
        api.save_plan(found.plan, file)
    if wanted["as_json"]:
        typer.echo(json.dumps(as_dicts(found), indent=2))
    else:
        talk.show(summary(found))
    talk.say("wrote", str(output))


def summary(found: Tuned) -> RenderableType:
    """The plans that ran, the fastest first."""
    from rich.console import Group
    from rich.text import Text

    from autoplan.report.tables import table
    from autoplan.report.words import clean, seconds

    made = table(
        ("<", "plan"), (">", "micro-batch"), (">", "predicted"), (">", "measured"), (">", "error"), (">", "predicted place")
    )
    for trial in found.trials:
        measured = trial.steps.step_time
        numbers = seconds(trial.predicted), seconds(measured), f"{trial.predicted / measured - 1:+.1%}", str(trial.place)
        made.add_row(*map(Text, (clean(str(trial.plan.mesh)), str(trial.plan.micro_batch), *numbers)))
    best = found.trials[0]
    verdict = f"Fastest: {best.plan.mesh}, {seconds(best.steps.step_time)} a step"
    verdict += ", as predicted." if best.place == 1 else f"; it was predicted to be number {best.place}."
    return Group(Text(verdict, style="bold"), Text(""), made)
