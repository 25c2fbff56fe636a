"""What is told of a mesh that was given up is true: no plan of it is faster, and what does not fit does not."""

from __future__ import annotations

import pytest

from autoplan.constraints import Constraints
from autoplan.errors import NothingFits
from autoplan.plan import Candidate
from autoplan.search.planner import search
from autoplan.strategy import DEGREES
from autoplan.units import Seconds
from autoplan.workload import Workload
from tests.bodies import model
from tests.hardware import machine

GRAPH = model(layers=4, hidden=1024, ffn=4096, seq=512, vocab=8192)
LOAD = Workload(global_batch=32)
TIGHT = 5e8
PLAN = search(GRAPH, machine(memory=TIGHT), LOAD, gpus=4)


def best_of(candidate: Candidate, memory: float) -> Seconds:
    """The step of the best plan on a mesh, of a micro-batch."""
    fixed = {axis: getattr(candidate.mesh, axis) for axis in DEGREES}
    only = Constraints(only={"micro_batch": [candidate.micro_batch]})
    return search(GRAPH, machine(memory=memory), LOAD, gpus=4, fixed=fixed, constraints=only).prediction.step_time


def test_no_plan_of_a_listed_mesh_beats_what_is_told_of_it() -> None:
    bounds = [c for c in PLAN.candidates if c.bound][:6]
    assert bounds
    for candidate in bounds:
        assert candidate.step_time is not None
        try:
            assert best_of(candidate, TIGHT) >= candidate.step_time * (1 - 2e-4), candidate
        except NothingFits:
            continue


def test_what_does_not_fit_does_not() -> None:
    for candidate in [c for c in PLAN.candidates if c.status == "out of memory"][:6]:
        with pytest.raises(NothingFits):
            best_of(candidate, TIGHT)


def test_most_are_told_by_how_much_they_are_slower() -> None:
    bounds = [c for c in PLAN.candidates if c.bound]
    assert sum(c.reason.endswith("not faster") for c in bounds) < len(bounds) / 2
