"""Why not? The best plan that keeps a wish beside a given one, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from autoplan.constraints import Constraints, LayerWish
from autoplan.errors import NothingFits, UsageError
from autoplan.graph import Graph
from autoplan.hardware import HardwareProfile
from autoplan.plan import Plan
from autoplan.search.planner import search
from autoplan.strategy import AXES, DEGREES

NEEDED = {
    "schedule": ("a pipeline", "pp"),
    "cp_kind": ("sequences that are cut", "cp"),
    "zero": ("parameters that are sharded", "dp_shard"),
}
"""Of what a wish says something, and the axis that must be above 1 for it."""


@dataclass(frozen=True)
class Answer:
    """What would become of a wish: the best plan that keeps it, or the reason why there is none."""

    asked: dict[str, int | str]
    plan: Plan | None
    reason: str
    kept: bool = False
    """Whether the given plan does it already."""


def answer(graph: Graph, hardware: HardwareProfile, plan: Plan, asked: Mapping[str, int | str], gap: float) -> Answer:
    """The best plan with all that is `asked`, under the given plan's workload and memory."""
    reason = _contradiction(plan.mesh.size, asked) or _nothing_to_do(graph, asked)
    if reason:
        return Answer(dict(asked), None, reason)
    headroom = max(0.0, 1.0 - plan.memory_limit / (hardware.device.memory - hardware.device.reserved))
    try:
        other = search(
            graph,
            hardware,
            plan.workload,
            gpus=plan.mesh.size,
            fixed={what: size for what, size in asked.items() if what in DEGREES and isinstance(size, int)},
            constraints=constraints(asked),
            headroom=headroom,
            gap=gap,
        )
    except (NothingFits, UsageError) as error:
        return Answer(dict(asked), None, error.message)
    return Answer(dict(asked), other, "", keeps(plan, asked))


def constraints(asked: Mapping[str, int | str]) -> Constraints:
    """What a search must keep to besides the axes. What a wish is of must be there: a schedule takes a pipeline."""
    layer: dict[str, Any] = {what: asked[what] for what in ("recompute", "zero") if what in asked}
    axes = [axis for what, (_, axis) in NEEDED.items() if what in asked and not _sharded_by_cp(what, asked)]
    return Constraints(
        only={what: [asked[what]] for what in ("micro_batch", "schedule", "cp_kind") if what in asked},
        never={axis: [1] for axis in axes},
        layers={"*": LayerWish(**layer)} if layer else {},
    )


def keeps(plan: Plan, asked: Mapping[str, int | str]) -> bool:
    """Whether a plan does all that is asked."""
    mesh = plan.mesh
    has: dict[str, set[int | str]] = {axis: {getattr(mesh, axis)} for axis in DEGREES}
    has["micro_batch"] = {plan.micro_batch}
    has["schedule"] = {plan.pipeline.schedule} if plan.pipeline else set()
    has["cp_kind"] = {mesh.cp_kind} if mesh.cp > 1 else set()
    has["recompute"] = {strategy.recompute for _, strategy in plan.layers()}
    has["zero"] = {strategy.zero for _, strategy in plan.layers()} if mesh.shards > 1 else set()
    return all(has[what] == {value} for what, value in asked.items())


def _sharded_by_cp(what: str, asked: Mapping[str, int | str]) -> bool:
    """FSDP shards over cp as well."""
    return what == "zero" and asked.get("cp", 1) != 1


def _contradiction(gpus: int, asked: Mapping[str, int | str]) -> str:
    sizes = {axis: size for axis in AXES if isinstance(size := asked.get(axis), int)}
    if gpus == prod(sizes.values()):
        sizes = dict.fromkeys(AXES, 1) | sizes
    for what, (of, axis) in NEEDED.items():
        if what in asked and sizes.get(axis) == 1 and not _sharded_by_cp(what, asked):
            return f"{what} {asked[what]} takes {of}: {axis} above 1"
    return ""


def _nothing_to_do(graph: Graph, asked: Mapping[str, int | str]) -> str:
    of_layers = [what for what in ("recompute", "zero") if what in asked]
    return f"the model has no layers that repeat, of which {of_layers[0]} is asked" if of_layers and not graph.blocks else ""
