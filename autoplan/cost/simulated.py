"""A plan's prediction with the event simulation in it, and a plan's steps as events.

The plan carries what the simulation needs, `Prediction.units`: what each of its layers, and each part of what stands outside
them, takes on every stream. They are what `cost.step` adds up, rounded to `DIGITS` so that people can read them; `step_of` is
made of the plan alone, so that a file tells its whole step. Parts of what stands outside the layers (before the first layer: the
embedding; after the last: the head) are computed where they stand; their parameters are gathered, and gradients reduced, in one.
A model without layers is one such part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

from autoplan.cost import events
from autoplan.cost.data_parallel import DataParallel
from autoplan.cost.layer import LayerCost
from autoplan.cost.model import OUTER, CostModel
from autoplan.cost.step import LayerStep
from autoplan.errors import UsageError
from autoplan.plan import Pipeline, Plan, Prediction, UnitPrediction, zero_level
from autoplan.units import SECOND, Seconds, parse, show

DIGITS = 6
"""Of a unit's seconds."""

COMPUTED = ("forward", "tp_forward", "recompute", "backward", "weights", "tp_backward")


def simulated(costs: CostModel, plan: Plan) -> Prediction:
    """The plan's prediction, with what its units take and the step as events. The plan must be one of the model."""
    found = replace(plan.prediction, units=tuple(_units(costs, plan)), overlap=costs.hardware.overlap)
    return replace(found, simulated=events.seconds(step_of(replace(plan, prediction=found))))


def predicted(costs: CostModel, plan: Plan) -> Prediction:
    """A written plan priced and simulated anew. Raises `UsageError` when it is not one of the model."""
    return simulated(costs, replace(plan, prediction=costs.predict_plan(plan)))


def step_of(plan: Plan) -> events.Step:
    """What a plan says of its step. Raises `UsageError` when it does not say what its layers take."""
    layers, outside = dict[str, UnitPrediction](), dict[tuple[str, str], UnitPrediction]()
    for unit in plan.prediction.units:
        for name in unit.layers:
            if unit.place:
                outside[unit.place, name] = unit
            else:
                layers[name] = unit
    names = [name for name, _ in plan.layers()]
    missing = [name for name in names if name not in layers]
    if missing:
        raise UsageError(
            f"the plan does not say how long the layer '{missing[0]}' takes.",
            "Price it anew: autoplan estimate plan.yaml -o new.yaml",
        )
    by_name = {name: zero_level(strategy.zero, plan.mesh, plan.workload) for name, strategy in plan.layers()}
    of_outer = zero_level(plan.outer_strategy.zero, plan.mesh, plan.workload)
    pipeline = plan.pipeline or Pipeline(split_before=())

    def pieces(name: str) -> Iterator[events.Piece]:
        if ("before", name) in outside:
            yield events.Piece(f"before {name}", True, of_outer, outside["before", name])
        yield events.Piece(name, False, by_name[name], layers[name])
        if ("after", name) in outside:
            yield events.Piece(f"after {name}", True, of_outer, outside["after", name])

    stages = tuple(tuple(piece for name in stage for piece in pieces(name)) for stage in plan.stages)
    if not names:
        stages = (tuple(events.Piece("model", True, of_outer, unit) for unit in plan.prediction.units),)
    return events.Step(
        stages=stages,
        micro_batches=plan.micro_batches,
        schedule=pipeline.schedule,
        chunks=pipeline.chunks,
        hop=plan.prediction.hop,
        overlap=plan.prediction.overlap,
    )


def _units(costs: CostModel, plan: Plan) -> Iterator[UnitPrediction]:
    """One for equal layers, in the order of the first of them; of what stands outside, one for each part of each stage."""
    bodies = {block.name: block.body for block in costs.graph.blocks}
    alike: dict[Any, list[str]] = {}
    split = plan.pipeline is not None and plan.pipeline.schedule == "zero-bubble"
    for name, strategy in plan.layers():
        alike.setdefault((bodies[name], strategy), []).append(name)
    for (body, strategy), names in alike.items():
        step, cost, dp = costs.parts(body, strategy, plan.mesh, plan.micro_batch, split=split)
        yield _rounded(_unit(tuple(names), "", step, cost, dp))
    order, edges = [name for name, _ in plan.layers()], [0]
    for stage in plan.stages:
        edges.append(edges[-1] + len(stage))
    for first, last in pairwise(edges):
        yield from map(_rounded, _outside(costs, plan, order, costs.outer.within(first, last), split))


def _outside(costs: CostModel, plan: Plan, names: list[str], regions: tuple[int, ...], split: bool) -> Iterator[UnitPrediction]:
    """The parts of what stands outside the layers of a stage: its seconds dealt as each part alone would take them, and what is
    of all its parameters with the first."""
    if not regions:
        return
    strategy, mesh = plan.outer_strategy, plan.mesh

    def unit(of: tuple[int, ...]) -> UnitPrediction:
        return _unit((), "before", *costs.parts(OUTER, strategy, mesh, plan.micro_batch, of, split=split))

    whole, alone = unit(regions), [unit((region,)) for region in regions]
    for number, region in enumerate(regions):
        place: Literal["before", "after"] = "before" if region < len(names) else "after"
        shares = {name: _share(whole, alone, number, name) for name in COMPUTED}
        once = dict.fromkeys(("gather", "unpack", "pack", "reduce", "all_reduce", "optimizer"), 0.0) if number else {}
        yield replace(whole, layers=tuple(names[region : region + 1] or names[-1:]), place=place, **shares, **once)


def _share(whole: UnitPrediction, alone: list[UnitPrediction], number: int, name: str) -> Seconds:
    """Of the whole's seconds, what is this part's."""
    each = [getattr(unit, name) for unit in alone]
    total = sum(each)
    share: Seconds = getattr(whole, name) * (each[number] / total if total else 1 / len(each))
    return share


def _unit(
    names: tuple[str, ...], place: Literal["", "before"], step: LayerStep, cost: LayerCost, dp: DataParallel
) -> UnitPrediction:  # fmt: skip
    return UnitPrediction(
        layers=names,
        place=place,
        forward=step.forward,
        tp_forward=cost.tp_forward,
        recompute=step.recompute,
        backward=step.backward,
        weights=step.late_seconds,
        tp_backward=cost.tp_backward,
        gather=dp.gather,
        unpack=dp.unpack,
        pack=dp.pack,
        reduce=dp.reduce,
        all_reduce=dp.final,
        optimizer=step.optimizer_seconds,
    )


def _rounded(unit: UnitPrediction) -> UnitPrediction:
    """As the plan's file shows them, in a unit that people read."""
    rounded: dict[str, Any] = {name: parse(show(took, SECOND, DIGITS), SECOND) for name, took in unit.seconds()}
    return replace(unit, **rounded)
