"""Which term of a prediction was wrong, and a profile that is right about what was measured. No torch in here.

A profile has terms that a run can correct (calibrate.terms), each by one factor `c_k` on its time. Given measured times `y_i`
(a run's step; its phases where they were looked at) and predictions `f_i(c)`, the factors are those with

    min over c of  sum_i w_i log(f_i(c) / y_i)^2 + RIDGE/runs sum_k log(c_k)^2

(`calibrated`, by Gauss-Newton in log c). The second sum keeps what the runs do not tell apart as it was: a single run without
phases corrects all terms by as much as they matter in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np
from numpy.typing import NDArray

from autoplan.calibrate.terms import TERMS, corrected, scaled
from autoplan.cost.model import CostModel
from autoplan.graph import Graph
from autoplan.hardware import HardwareProfile
from autoplan.measurement import MeasuredSteps
from autoplan.plan import Plan, Prediction
from autoplan.units import Bytes, Seconds

RIDGE = 1e-3
"""Weight of a factor's own logarithm, beside 1 for a run's step."""
PHASE = 0.25
"""Weight of a phase: the profiler slows what it looks at."""
FAR = 0.1
"""Beyond this a miss counts by its size, not by its square: a run that something disturbed doesn't decide."""
_ROUNDS = 20
_NUDGE = 1e-3
_FARTHEST = log(30.0)
"""No term is further off than this; who needs more has another machine's profile."""
_SHORT = 0.01
"""A phase that is predicted or measured to be a smaller share of the step tells nothing."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """A plan that was run, and its graph."""

    graph: Graph
    plan: Plan
    steps: MeasuredSteps


@dataclass(frozen=True)
class Line:
    """A predicted time or size beside the measured one."""

    run: int
    what: str
    predicted: float
    measured: float
    corrected: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def left(self) -> float:
        """The error that is left after the correction."""
        return self.corrected / self.measured - 1


@dataclass(frozen=True)
class Calibration:
    """The corrected profile and how it came about."""

    profile: HardwareProfile
    factors: Mapping[str, float]
    """By term: how many times longer it takes than the profile said."""
    times: tuple[Line, ...]
    memory: tuple[Line, ...]
    extra_reserved: Bytes
    """By how much `reserved` grew, because a run held more than was predicted."""

    @property
    def wrong(self) -> str:
        """The term that was furthest off."""
        return max(self.factors, key=lambda term: abs(log(self.factors[term])))


def calibrated(profile: HardwareProfile, runs: Sequence[Run], date: str) -> Calibration:
    """The profile that predicts the runs best, near the given one; `date` is written into it.

    Raises `UsageError` for a plan that is not its graph's.
    """
    models = _Models(profile, runs)
    start = models.predictions({})
    wanted = [_observed(run, prediction) for run, prediction in zip(runs, start, strict=True)]
    logs, ridge = np.zeros(len(TERMS)), np.sqrt(RIDGE / len(runs))
    for _ in range(_ROUNDS):
        here, weights = _misses(models, logs, wanted)
        weights *= FAR / np.maximum(abs(here), FAR)
        nudged = (logs + _NUDGE * unit for unit in np.eye(len(TERMS)))
        slopes = np.stack([(_misses(models, each, wanted)[0] - here) / _NUDGE for each in nudged], axis=1)
        left = np.vstack([slopes * np.sqrt(weights)[:, None], ridge * np.eye(len(TERMS))])
        right = np.concatenate([-here * np.sqrt(weights), -ridge * logs])
        move = np.clip(np.linalg.lstsq(left, right, rcond=None)[0], -1.0, 1.0)
        logs = np.clip(logs + move, -_FARTHEST, _FARTHEST)
        if abs(move).max() < 1e-4:
            break
    factors = {term: exp(value) for term, value in zip(TERMS, logs, strict=True)}
    end = models.predictions(factors)
    memory = [line for i, run in enumerate(runs) for line in _memory(i, run, start[i], profile)]
    extra = max([0.0, *(line.measured - line.predicted for line in memory)])
    return Calibration(
        profile=corrected(profile, factors, extra, date, _told(runs)),
        factors=factors,
        times=tuple(line for i, run in enumerate(runs) for line in _lines(i, run, start[i], end[i])),
        memory=tuple(memory),
        extra_reserved=extra,
    )


def _told(runs: Sequence[Run]) -> str:
    first = f"{len(runs)} runs" if len(runs) > 1 else f"a run of {runs[0].plan.model} on {runs[0].plan.mesh}"
    return f"{first}, {runs[0].steps.ranks} ranks of {runs[0].steps.device}"


class _Models:
    """The predictions of all runs under scaled profiles; runs of one graph and workload share a cost model."""

    def __init__(self, profile: HardwareProfile, runs: Sequence[Run]) -> None:
        self.profile, self.runs = profile, runs

    def predictions(self, factors: Mapping[str, float]) -> list[Prediction]:
        hardware = scaled(self.profile, factors)
        models: dict[object, CostModel] = {}
        found = []
        for run in self.runs:
            key = run.graph.fingerprint, run.plan.workload
            if key not in models:
                models[key] = CostModel(run.graph, hardware, run.plan.workload)
            found.append(models[key].predict_plan(run.plan))
        return found


def _step(prediction: Prediction) -> Seconds:
    """What is compared with a measured step: with a pipeline its exact timeline."""
    return prediction.step_time if prediction.scheduled is None else prediction.scheduled


def _phases(prediction: Prediction) -> dict[str, Seconds]:
    time = prediction.time
    return {
        "forward": time.forward,
        "backward": time.backward + time.recompute,
        "communication": time.tp_communication + time.dp_communication + time.pp_communication,
        "optimizer": time.optimizer,
    }


def _observed(run: Run, prediction: Prediction) -> dict[str, tuple[Seconds, float]]:
    """(measured seconds, weight) of the step and of each phase that says something."""
    found = {"step": (run.steps.step_time, 1.0)}
    said = _phases(prediction)
    for name, seconds in run.steps.phases.items():
        if min(seconds, said[name]) > _SHORT * run.steps.step_time:
            found[name] = (seconds, PHASE)
    return found


def _misses(models: _Models, logs: Numbers, wanted: Sequence[Mapping[str, tuple[Seconds, float]]]) -> tuple[Numbers, Numbers]:
    """log(predicted / measured) of everything observed, and the weights."""
    found, weights = [], []
    predictions = models.predictions({term: exp(value) for term, value in zip(TERMS, logs, strict=True)})
    for prediction, observed in zip(predictions, wanted, strict=True):
        said = {"step": _step(prediction), **_phases(prediction)}
        for name, (seconds, weight) in observed.items():
            found.append(log(max(said[name], 1e-12) / seconds))
            weights.append(weight / len(wanted))
    return np.array(found), np.array(weights)


def _lines(i: int, run: Run, before: Prediction, after: Prediction) -> list[Line]:
    lines = [Line(i, "step", _step(before), run.steps.step_time, _step(after))]
    if run.steps.phases:
        said, now = _phases(before), _phases(after)
        lines += [Line(i, name, said[name], seconds, now[name]) for name, seconds in run.steps.phases.items() if seconds]
    return lines


def _memory(i: int, run: Run, prediction: Prediction, profile: HardwareProfile) -> list[Line]:
    """Peak bytes; what a CPU's process holds has PyTorch's own in it, which the profile calls reserved."""
    if run.steps.peak_memory is None:
        return []
    said = prediction.memory.allocated + (profile.device.reserved if run.steps.device == "cpu" else 0.0)
    return [Line(i, "peak memory", said, run.steps.peak_memory, max(said, run.steps.peak_memory))]
