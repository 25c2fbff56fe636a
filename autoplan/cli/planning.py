"""Commands that think: plan, explain."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from autoplan.cli import arguments, outputs, talk
from autoplan.cli.app import app
from autoplan.cli.arguments import Force, Json, Model, Open, PlanFile, Settings
from autoplan.plan import Plan
from autoplan.units import SECOND, parse, show


@app.command(
    epilog="Examples:\n\nautoplan plan model.py --gpus 8\n\n"
    "autoplan plan model.py --gpus 64 --hardware h100-sxm-8x --global-batch 512\n\n"
    "autoplan plan model.py --set size=70B --gpus 256 --tp 8 -o plan-70b.yaml --report plan-70b.html\n\n"
    "autoplan plan model.py --gpus 8..64 --global-batch 256 --step-time '2.5 s'\n\n"
    "autoplan plan model.py --gpus 8..64 --global-batch 256 --objective cost=2.50\n\n"
    "autoplan plan model.py --gpus 8 --constraints wishes.yaml --top 3\n\n"
    "autoplan plan model.py --gpus 8 --frontier 8\n\n"
    "autoplan plan model.py --gpus 64 --global-batch 512 --beside torchtitan.toml"
)
def plan(
    model: Model,
    gpus: Annotated[
        str,
        typer.Option("--gpus", metavar="N|N..N", help="Devices; of a range the fewest that fit and are fast enough."),
    ],
    step_time: Annotated[
        str | None, typer.Option(metavar="TIME", help="With a range of --gpus: a step may take so long, such as 2.5 s.")
    ] = None,
    objective: Annotated[
        str,
        typer.Option(metavar="WHAT", help="Of a range of --gpus: fewest, speed (tokens/s), cost, or cost=PRICE of a GPU-hour."),
    ] = "fewest",
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="A profile of `autoplan hardware`, a YAML file, or auto: what this machine has.",
            autocompletion=arguments.hardware_completions,
        ),
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Samples of one optimizer step, over all devices.")
    ] = None,
    pp: Annotated[int | None, typer.Option(min=1, metavar="N", help="Fix this axis of the mesh; 1: no pipeline.")] = None,
    dp_replicate: Annotated[int | None, typer.Option(min=1, metavar="N", help="Fix this axis of the mesh.")] = None,
    dp_shard: Annotated[int | None, typer.Option(min=1, metavar="N", help="Fix this axis of the mesh.")] = None,
    cp: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Fix this axis of the mesh; 1: sequences stay whole.")
    ] = None,
    ep: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Fix over how many GPUs experts are dealt; 1: none are.")
    ] = None,
    tp: Annotated[int | None, typer.Option(min=1, metavar="N", help="Fix this axis of the mesh.")] = None,
    compile_layers: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Run layers through torch.compile.", show_default=False)
    ] = None,
    expert_imbalance: Annotated[
        float | None,
        typer.Option(min=1, metavar="FACTOR", help="Tokens of the device with most, over the mean, where experts are dealt."),
    ] = None,
    constraints: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML: choices for axes, and what layers and parameters must do.")
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="What you run today, priced beside the plan: as in `autoplan estimate --from`."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Also write the best plans on N - 1 other meshes.")] = 1,
    memory_headroom: Annotated[
        str, typer.Option(metavar="SHARE", help="Share of each device's memory to keep free: 10%.")
    ] = "0%",
    frontier: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Also find the fastest plans on less memory: N from fast to lean.")
    ] = None,
    gap: Annotated[float, typer.Option(metavar="SHARE", help="Distance from the optimum at which to stop.")] = 1e-4,
    time_limit: Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="Stop then with the best so far.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the plan goes.")] = Path("plan.yaml"),
    report: Annotated[Path, typer.Option("--report", help="Where the HTML report goes.")] = Path("report.html"),
    settings: Settings = None,
    as_json: Json = False,
    force: Force = False,
    open_page: Open = False,
) -> None:
    """Find the fastest way to train MODEL on so many GPUs; write the plan and its report. Needs no GPU."""
    headroom, model_kwargs = arguments.share(memory_headroom), arguments.settings(settings)
    others = [arguments.numbered(output, number) for number in range(2, top + 1)]
    wanted, price = arguments.objective(objective)
    outputs.check((output, report, *others), force)
    hardware = arguments.hardware_here(hardware)
    from autoplan import api

    axes = {"pp": pp, "dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "tp": tp, "ep": ep}
    wishes: dict[str, Any] = {"hardware": hardware} if hardware is not None else {}
    wishes |= {"objective": wanted, "constraints": constraints}
    started = perf_counter()
    with talk.progress() as on_progress:
        found, *rest = api.plans(
            model,
            top,
            gpus=arguments.numbers(gpus),
            step_time=None if step_time is None else parse(step_time, SECOND),
            global_batch=global_batch,
            compile=compile_layers,
            expert_imbalance=expert_imbalance,
            fixed={axis: size for axis, size in axes.items() if size is not None},
            headroom=headroom,
            frontier=frontier or 0,
            gap=gap,
            model_kwargs=model_kwargs,
            time_limit=time_limit,
            beside=beside or (),
            on_progress=on_progress,
            **wishes,
        )
    talk.add("took", f"{perf_counter() - started:.1f} s")
    with outputs.atomically(output) as plan_file, outputs.atomically(report) as page_file:
        api.save_plan(found, plan_file)
        page_file.write_text(api.report(found), encoding="utf-8")
    if hardware is None:
        talk.say("hardware", f"{found.hardware} (--hardware names another one)")
    if global_batch is None:
        talk.say("global batch", f"{found.workload.global_batch} samples (--global-batch sets it)")
    if as_json:
        typer.echo(api.plan_json(found))
    else:
        from autoplan.report.terminal import summary

        talk.show(summary(found, str(output)))
    if wanted == "cost":
        talk.say("cost", _cost(found, price))
    talk.say("wrote", f"{output} and {report}")
    from autoplan.report.words import percent

    for path, other in zip(others, rest, strict=False):
        with outputs.atomically(path) as other_file:
            api.save_plan(other, other_file)
        slower = other.prediction.step_time / found.prediction.step_time - 1
        talk.say("wrote", f"{path}: {other.mesh}, {show(other.prediction.step_time, SECOND)} a step, {percent(slower)} slower")
    if open_page:
        outputs.open_in_browser(report)
    if found.solve.stopped == "interrupted":
        raise typer.Exit(130)


def _cost(plan: Plan, price: float | None) -> str:
    tokens = plan.tokens * plan.workload.global_batch
    hours = plan.mesh.size * plan.prediction.step_time / 3600 / tokens * 1e6
    paid = "" if price is None else f", {hours * price:.4g} at {price:g} an hour"
    return f"{hours:.4g} GPU-hours a million tokens{paid} on {plan.mesh.size} GPUs"


@app.command(
    epilog="Examples:\n\nautoplan explain plan.yaml tp=2\n\nautoplan explain plan.yaml pp=4 schedule=zero-bubble\n\n"
    "autoplan explain plan.yaml recompute=none\n\nautoplan explain plan.yaml tp=3 --json"
)
def explain(
    plan_file: PlanFile,
    wishes: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT=VALUE...",
            help="Axes of the mesh, tp=2 dp_shard=4; micro_batch, schedule, cp_kind; recompute and zero of all layers.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Answer "why not tp=2?": the best plan with that wish beside the given one, or why there is none."""
    from autoplan import api
    from autoplan.report.compare import answer

    asked = arguments.wishes(wishes)
    plan = api.load_plan(plan_file)
    told = api.explain(plan, asked)
    if as_json:
        other = told.plan and json.loads(api.plan_json(told.plan))
        typer.echo(json.dumps({"asked": told.asked, "plan": other, "reason": told.reason}, indent=2))
        return
    talk.show(answer(plan, told.asked, told.plan, told.reason, told.kept))
