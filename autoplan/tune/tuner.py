"""Run the best candidates for real and rank them anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from autoplan.capture import LoadedModel
from autoplan.constraints import Constraints
from autoplan.errors import AutoplanError, NothingFits, UsageError
from autoplan.graph import Graph
from autoplan.hardware import HardwareProfile
from autoplan.measurement import MeasuredSteps
from autoplan.plan import Plan
from autoplan.search.planner import search
from autoplan.strategy import DEGREES
from autoplan.tune.steps import measured_steps
from autoplan.units import SECOND, Seconds, show
from autoplan.workload import Workload


@dataclass(frozen=True)
class Trial:
    """A plan and what it took here."""

    plan: Plan
    steps: MeasuredSteps
    place: int
    """Of the prediction: 1 is what `autoplan plan` would have chosen."""

    @property
    def predicted(self) -> Seconds:
        """Of a pipeline on its exact timeline."""
        prediction = self.plan.prediction
        return prediction.step_time if prediction.scheduled is None else prediction.scheduled


@dataclass(frozen=True)
class Tuned:
    """All trials, the fastest first, and the winner's plan, which says what was measured."""

    trials: tuple[Trial, ...]
    plan: Plan


Tell = Callable[[str], None]


def candidates(graph: Graph, profile: HardwareProfile, load: Workload, gpus: int, top: int) -> Iterator[Plan]:
    """The plan, and the best plan of each of the meshes that were predicted to come next; at most `top` in all."""
    first = search(graph, profile, load, gpus=gpus)
    yield first
    ranked = sorted(
        (c for c in first.candidates if c.status == "slower" and c.step_time is not None), key=lambda c: c.step_time or 0.0
    )
    meshes = [mesh for mesh in dict.fromkeys(c.mesh for c in ranked) if mesh != first.mesh]
    found = 1
    for mesh in meshes:
        if found == top:
            return
        with suppress(NothingFits):
            fixed = {axis: getattr(mesh, axis) for axis in DEGREES}
            kind = Constraints(only={"cp_kind": [mesh.cp_kind]})
            yield search(graph, profile, load, gpus=gpus, fixed=fixed, constraints=kind)
            found += 1


def tune(
    plans: list[Plan], loaded: LoadedModel, *, steps: int, device: torch.device, rounds: int = 2, tell: Tell = lambda _: None
) -> Tuned:
    """Run each plan `steps` steps in all, in rounds, so that a machine that grows slower does not wrong the last.

    Every rank calls this; only the first one's `plans` count. Raises `UsageError`, naming the plan, when one does not run.
    """
    shared: list[Any] = [plans]
    dist.broadcast_object_list(shared, src=0, device=device)
    plans = shared[0]
    rounds = min(rounds, steps)
    times: dict[int, list[MeasuredSteps]] = {i: [] for i in range(len(plans))}
    for turn in range(rounds):
        for i, plan in enumerate(plans):
            tell(f"round {turn + 1} of {rounds}: {plan.mesh}, micro-batch {plan.micro_batch}")
            share = steps // rounds + (turn < steps % rounds)
            try:
                times[i].append(measured_steps(plan, loaded, share, device=device))
            except (AutoplanError, RuntimeError) as error:
                raise UsageError(
                    f"the plan on {plan.mesh} does not run here: {_first_line(error)}.",
                    "Plan with --memory-headroom, or --top 1.",
                ) from error
    trials = [Trial(plan, _together(times[i]), i + 1) for i, plan in enumerate(plans)]
    trials.sort(key=lambda trial: trial.steps.step_time)
    best = trials[0]
    note = f"the fastest of {len(trials)} plans that were run: {show(best.steps.step_time, SECOND)} a step measured"
    return Tuned(tuple(trials), replace(best.plan, warnings=(*best.plan.warnings, note)))


def _together(rounds: list[MeasuredSteps]) -> MeasuredSteps:
    peaks = [each.peak_memory for each in rounds if each.peak_memory is not None]
    seconds = tuple(second for each in rounds for second in each.seconds)
    return replace(rounds[0], seconds=seconds, peak_memory=max(peaks, default=None))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def as_dicts(found: Tuned) -> list[Mapping[str, Any]]:
    """The trials as plain data, the fastest first."""
    return [
        {
            "mesh": asdict(trial.plan.mesh),
            "micro_batch": trial.plan.micro_batch,
            "predicted_place": trial.place,
            "predicted": trial.predicted,
            "measured": trial.steps.step_time,
            "seconds": list(trial.steps.seconds),
        }
        for trial in found.trials
    ]
