"""`autoplan apply --dry-run`: what would be wrapped, sharded, split and recomputed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoplan.cli import talk
from autoplan.cli.app import app
from autoplan.cli.arguments import Json, PlanFile
from autoplan.errors import UsageError
from autoplan.plan import Plan

if TYPE_CHECKING:
    from rich.console import RenderableType

    from autoplan.apply.inventory import Held, Inventory, Unit


@app.command(
    epilog="Examples:\n\nautoplan apply plan.yaml --dry-run\n\nautoplan apply plan.yaml model.py --dry-run\n\n"
    "autoplan apply plan.yaml --dry-run --json"
)
def apply(
    plan_file: PlanFile,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Default: the model that the plan names.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; nothing is trained.")] = False,
    as_json: Json = False,
) -> None:
    """Show what applying the plan does to the model: wrapped, sharded, split into stages, recomputed.

    Without GPUs or other processes, and without memory for the weights. To train, call autoplan.apply in your program.
    """
    if not dry_run:
        raise UsageError(
            "a plan is applied by the program that trains, on every device.",
            "Call autoplan.apply(build_model, plan) there and start it with torchrun; --dry-run shows what it will do.",
        )
    from autoplan import api
    from autoplan.verify.applied import applied

    plan = api.load_plan(plan_file)
    found = applied(plan, api.load_model(model or plan.model))
    if as_json:
        typer.echo(json.dumps(as_dict(plan, found), indent=2))
    else:
        talk.show(summary(plan, found))


def as_dict(plan: Plan, found: Sequence[Inventory]) -> dict[str, Any]:
    """All that was found as plain data: shapes, layouts as the plan's file writes them, bytes."""

    def unit(one: Unit) -> dict[str, Any]:
        parameters = [{**asdict(held), "layout": str(held.layout)} for held in one.parameters]
        return {**asdict(one), "parameters": parameters}

    return {
        "mesh": asdict(plan.mesh),
        "micro_batches": plan.micro_batches,
        "micro_batch": plan.micro_batch,
        "crossings": [asdict(crossing) for crossing in found[0].crossings],
        "ranks": [{"rank": one.rank, "stages": list(one.stages), "units": list(map(unit, one.units))} for one in found],
    }


def summary(plan: Plan, found: Sequence[Inventory]) -> RenderableType:
    """Four sections: wrapped, sharded, split, recomputed."""
    from rich.console import Group
    from rich.text import Text

    from autoplan.report.tables import titled
    from autoplan.report.words import clean, plural

    samples = plural(plan.micro_batch, "sample")
    lines = [
        f"{clean(plan.model)} on {plural(plan.mesh.size, 'device')}: {plan.mesh}",
        f"{plural(plan.micro_batches, 'micro-batch')} of {samples} a step on each data-parallel rank",
    ]
    groups = _groups([unit for one in found for unit in one.units])
    parts: list[RenderableType] = [Text("\n".join(lines), style="bold")]
    parts.append(titled(f"Wrapped: FSDP {_over(plan)}", _wrapped(plan, groups)))
    distinct: dict[Any, list[Unit]] = {}
    for group in groups:
        distinct.setdefault((group[0].strategy, _shapes(group[0])), []).extend(group)
    for alike in distinct.values():
        parts.append(titled(f"Sharded: {_names(alike)}", _sharded(plan, alike[0].parameters)))
    if plan.pipeline is not None:
        parts.append(titled(f"Split: {plan.pipeline.schedule} on {plan.mesh.pp} pipeline ranks", _split(plan, found)))
        parts.append(titled("Crosses, of each micro-batch", _crossings(found[0])))
    again = [_again(group) for group in groups if group[0].recomputed != "none"]
    parts.append(titled("Recomputed in the backward pass", Text("\n".join(again) or "nothing")))
    return Group(*parts)


def _again(group: list[Unit]) -> str:
    return _names(group) + (", selectively" if group[0].recomputed == "selective" else "")


def _shapes(unit: Unit) -> tuple[Any, ...]:
    return tuple((held.name, held.shape, held.local_shape) for held in unit.parameters)


def _groups(units: list[Unit]) -> list[list[Unit]]:
    """Neighbours that are alike."""
    key = lambda unit: (unit.stage, unit.name == "", unit.strategy, _shapes(unit))  # noqa: E731
    return [list(group) for _, group in groupby(units, key)]


def _names(group: list[Unit]) -> str:
    from autoplan.report.words import clean, fold

    if group[0].name:
        return fold([unit.name for unit in group])
    owners = list(dict.fromkeys(map(_owner, group[0].parameters)))
    more = f" and {len(owners) - 2} more" if len(owners) > 2 else ""
    return ", ".join(map(clean, owners[:2])) + more


def _owner(held: Held) -> str:
    """The module whose parameter it is; a parameter of the model itself stands for itself."""
    return held.name.rpartition(".")[0] or held.name


def _over(plan: Plan) -> str:
    axes = [f"{axis} {getattr(plan.mesh, axis)}" for axis in ("dp_replicate", "dp_shard", "cp") if getattr(plan.mesh, axis) > 1]
    over = f"over {' x '.join(axes)}" if axes else "on one rank, for number formats alone"
    return f"{over}; experts over efsdp {plan.mesh.efsdp}" if plan.mesh.ep > 1 else over


def _wrapped(plan: Plan, groups: list[list[Unit]]) -> RenderableType:
    from rich.text import Text

    from autoplan.report.tables import table
    from autoplan.report.words import short_count

    stage = (("<", "stage"),) if plan.pipeline else ()
    made = table(("<", "module"), *stage, (">", "units"), (">", "parameters"), (">", "held"), ("<", "after forward"))
    for group in groups:
        unit = group[0]
        parameters = short_count(sum(prod(held.shape) for held in unit.parameters))
        held = short_count(sum(prod(held.local_shape) for held in unit.parameters))
        where = ("shared" if unit.stage is None else str(unit.stage),) if plan.pipeline else ()
        cells = (_names(group), *where, str(len(group)), parameters, held, "frees" if unit.reshard_after_forward else "keeps")
        made.add_row(*map(Text, cells))
    return made


def _sharded(plan: Plan, parameters: Sequence[Held]) -> RenderableType:
    from rich.text import Text

    from autoplan.report.tables import table
    from autoplan.report.words import clean

    tp, ep, dp = plan.mesh.tp > 1, plan.mesh.ep > 1, plan.mesh.shards > 1
    axes = [("<", axis) for axis, used in (("tp", tp), ("ep", ep), ("FSDP", dp)) if used]
    made = table(("<", "parameter"), ("<", "whole"), *axes, ("<", "held"))
    for held in parameters:
        across = ["-" if held.dealt else str(held.layout)] * tp + [str(held.layout) if held.dealt else "-"] * ep
        layouts = [*across, *[f"Shard({held.fsdp_dim})"] * dp]
        made.add_row(*map(Text, (clean(held.name), _shape(held.shape), *layouts, _shape(held.local_shape))))
    return made


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _split(plan: Plan, found: Sequence[Inventory]) -> RenderableType:
    from rich.text import Text

    from autoplan.report.tables import table
    from autoplan.report.words import clean, fold

    made = table((">", "stage"), (">", "rank"), ("<", "layers"), ("<", "with, from outside the layers"))
    for number, names in enumerate(plan.stages):
        units = [unit for unit in found[number % plan.mesh.pp].units if not unit.name and unit.stage in (number, None)]
        outside = dict.fromkeys(clean(_owner(held)) for unit in units for held in unit.parameters)
        made.add_row(*map(Text, (str(number), str(number % plan.mesh.pp), fold(names), "\n".join(outside) or "-")))
    return made


def _crossings(found: Inventory) -> RenderableType:
    from rich.text import Text

    from autoplan.report.tables import table
    from autoplan.report.words import clean, size

    made = table(("<", "stages"), ("<", "made by"), ("<", "shape"), ("<", "dtype"), (">", "size"), ("<", "back"))
    for each in found.crossings:
        back = "gradient" if each.gradient else "-"
        cells = (f"{each.source} to {each.last}", clean(each.made_by), _shape(each.shape), each.dtype, size(each.bytes), back)
        made.add_row(*map(Text, cells))
    return made
