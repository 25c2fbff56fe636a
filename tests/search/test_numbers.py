"""The fewest devices that fit, or meet a step time."""

from __future__ import annotations

import pytest

from autoplan import api
from autoplan.errors import NothingFits, UsageError
from autoplan.search.numbers import counts
from tests.bodies import model
from tests.hardware import machine

GRAPH = model(layers=4, hidden=1024, ffn=4096, seq=512, vocab=8192)


def test_numbers_are_whole_nodes() -> None:
    assert list(counts(6, 32, machine(span=8))) == [6, 7, 8, 16, 24, 32]
    with pytest.raises(UsageError, match="no range"):
        list(counts(8, 4, machine()))
    with pytest.raises(UsageError, match="multiple of a node's 8 GPUs"):
        list(counts(9, 15, machine(span=8)))


def test_the_fewest_that_fit_are_found() -> None:
    small = machine(memory=0.6e9)
    plan = api.plan(GRAPH, gpus=(1, 8), hardware=small, global_batch=8)
    assert plan.mesh.size > 1
    for fewer in range(1, plan.mesh.size):
        with pytest.raises(NothingFits):
            api.plan(GRAPH, gpus=fewer, hardware=small, global_batch=8)


def test_the_fewest_that_are_fast_enough_are_found() -> None:
    times = [api.plan(GRAPH, gpus=n, hardware=machine(), global_batch=8).prediction.step_time for n in (1, 2, 4, 8)]
    wanted = (times[1] + times[2]) / 2
    plan = api.plan(GRAPH, gpus=(1, 8), step_time=wanted, hardware=machine(), global_batch=8)
    assert times[1] > wanted >= plan.prediction.step_time
    assert 2 < plan.mesh.size <= 4
    with pytest.raises(NothingFits, match="takes a step within"):
        api.plan(GRAPH, gpus=(1, 8), step_time=times[3] / 10, hardware=machine(), global_batch=8)


def test_the_cheapest_and_the_fastest_are_found() -> None:
    """On a slow network more devices take fewer seconds and more device-seconds."""
    every = [api.plan(GRAPH, gpus=n, hardware=machine(memory=0.6e9), global_batch=8) for n in (2, 4, 8)]
    cost = {p.mesh.size: p.mesh.size * p.prediction.step_time for p in every}
    cheapest = api.plan(GRAPH, gpus=(1, 8), objective="cost", hardware=machine(memory=0.6e9), global_batch=8)
    fastest = api.plan(GRAPH, gpus=(1, 8), objective="speed", hardware=machine(memory=0.6e9), global_batch=8)
    assert cheapest.mesh.size * cheapest.prediction.step_time <= min(cost.values()) * (1 + 1e-4)
    assert fastest.prediction.step_time <= min(p.prediction.step_time for p in every) * (1 + 1e-4)
    within = api.plan(
        GRAPH, gpus=(1, 8), objective="cost", step_time=fastest.prediction.step_time * 1.0001, hardware=machine(memory=0.6e9),
        global_batch=8,
    )  # fmt: skip
    assert within.mesh.size == fastest.mesh.size > cheapest.mesh.size
