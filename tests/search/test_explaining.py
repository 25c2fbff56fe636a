"""Why not? Every wish is answered by the best plan that keeps it, or by what forbids it."""

from __future__ import annotations

import pytest

from autoplan.constraints import Constraints, LayerWish
from autoplan.errors import UsageError
from autoplan.files.wishes import wishes
from autoplan.hardware import HardwareProfile
from autoplan.search.explaining import Answer, answer, keeps
from autoplan.search.planner import search
from autoplan.workload import Workload
from tests.bodies import model
from tests.hardware import machine

GRAPH = model(layers=4, hidden=1024, ffn=4096, seq=512, vocab=8192)
LOAD = Workload(global_batch=16)
TIGHT = machine(memory=1.0e9)
PLAN = search(GRAPH, TIGHT, LOAD, gpus=4)


def asked(hardware: HardwareProfile = TIGHT, **pairs: int | str) -> Answer:
    return answer(GRAPH, hardware, PLAN, wishes(pairs), 1e-4)


@pytest.mark.parametrize(
    ("pairs", "constraints"),
    [
        ({"schedule": "gpipe"}, Constraints(only={"schedule": ["gpipe"]}, never={"pp": [1]})),
        ({"schedule": "zero-bubble", "pp": 2}, Constraints(only={"schedule": ["zero-bubble"], "pp": [2]})),
        ({"micro_batch": 2, "tp": 2}, Constraints(only={"micro_batch": [2], "tp": [2]})),
        ({"recompute": "full"}, Constraints(layers={"*": LayerWish(recompute="full")})),
        ({"zero": "3"}, Constraints(never={"dp_shard": [1]}, layers={"*": LayerWish(zero=3)})),
    ],
    ids=str,
)
def test_the_answer_is_the_best_plan_that_keeps_the_wish(pairs: dict[str, int | str], constraints: Constraints) -> None:
    told = asked(**pairs)
    assert told.plan is not None
    assert keeps(told.plan, told.asked)
    best = search(GRAPH, TIGHT, LOAD, gpus=4, constraints=constraints)
    assert told.plan.prediction.step_time == pytest.approx(best.prediction.step_time, rel=2e-4)
    assert told.plan.prediction.step_time >= PLAN.prediction.step_time * (1 - 1e-4)


def test_what_the_plan_has_is_said_to_be_kept() -> None:
    assert asked(micro_batch=PLAN.micro_batch, dp_shard=PLAN.mesh.dp_shard).kept
    assert not asked(recompute="full").kept


def test_zero_1_is_had_with_one_micro_batch_too() -> None:
    told = asked(machine(memory=8e9), zero=1, dp_shard=4, micro_batch=4)
    assert told.plan is not None
    assert {strategy.zero for _, strategy in told.plan.layers()} == {1}


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ({"schedule": "1f1b", "pp": 1}, "schedule 1f1b takes a pipeline: pp above 1"),
        ({"schedule": "1f1b", "tp": 4}, "schedule 1f1b takes a pipeline: pp above 1"),
        ({"zero": 3, "dp_shard": 1}, "zero 3 takes parameters that are sharded: dp_shard above 1"),
        ({"cp_kind": "ring", "cp": 1}, "cp_kind ring takes sequences that are cut: cp above 1"),
        ({"cp_kind": "ring"}, "no input of the model is a sequence of token numbers"),
        ({"tp": 3}, "tp 3 does not divide 4 devices"),
        ({"micro_batch": 3}, "a micro-batch of 3 does not divide the 16 samples of a step"),
        ({"micro_batch": 16, "dp_shard": 4}, "does not divide the 4 samples of a step of each of 4 data-parallel groups"),
        ({"pp": 4, "micro_batch": 8, "schedule": "zero-bubble"}, "not searched with fewer micro-batches (2) than pp 4 stages"),
        ({"pp": 4, "micro_batch": 8, "schedule": "interleaved-1f1b"}, "needs micro-batches (2) in multiples of pp 4"),
        ({"pp": 4, "micro_batch": 1, "schedule": "interleaved-1f1b"}, "4 layers over pp 4 leave a rank no chunks"),
        ({"schedule": "zero-bubble", "recompute": "full"}, "zero-bubble is searched without recomputation"),
        ({"zero": 2, "pp": 2}, "ZeRO-2 is not searched with a pipeline"),
    ],
    ids=str,
)
def test_what_is_illegal_has_its_reason(pairs: dict[str, int | str], reason: str) -> None:
    told = asked(**pairs)
    assert told.plan is None
    assert reason in told.reason


def test_what_does_not_fit_says_by_how_much() -> None:
    told = asked(machine(memory=2e8), dp_replicate=4)
    assert told.plan is None
    assert "the nearest miss (dp_replicate 4, micro-batch 1) needs at least" in told.reason
    assert "too much" in told.reason


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("schedule", "zerobubble", "none of gpipe, 1f1b, interleaved-1f1b, zero-bubble"),
        ("recompute", "some", "none of none, selective, full"),
        ("zero", "4", "none of 1, 2, 3"),
        ("cp_kind", "rings", "none of ulysses, ring"),
        ("tq", "2", "none of pp, dp_replicate, dp_shard, cp, tp, ep, micro_batch, schedule, cp_kind, recompute, zero"),
        ("tp", "0", "no size of an axis"),
        ("micro_batch", "2.5", "no number of samples"),
    ],
)
def test_a_wrong_word_is_told_the_right_ones(what: str, value: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        wishes({what: value})
    assert message in caught.value.message
