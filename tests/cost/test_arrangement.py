from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplan.cost.compute import memory_time
from autoplan.cost.model import OUTER, CostModel, Cut
from autoplan.errors import UsageError
from autoplan.strategy import UNSHARDED, Mesh, Strategy
from autoplan.workload import Workload
from benchmarks.arrangement import Arranged, Arrangement, Software
from benchmarks.memory import numel
from tests.bodies import model
from tests.cost.test_model import GRAPH
from tests.hardware import machine

LAYERS = len(GRAPH.blocks)


def costs(batch: int = 64) -> CostModel:
    return CostModel(GRAPH, machine(), Workload(global_batch=batch))


def at(**changes: object) -> Arrangement:
    usual = Arrangement(tp=1, dp=1, pp=1, micro_batch=1, zero=0, block=UNSHARDED, outer=UNSHARDED, layers=LAYERS)
    return replace(usual, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("dp", [2, 8, 16])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("stays", [False, True])
def test_one_stage_is_what_the_planner_prices(dp: int, recompute: str, stays: bool) -> None:
    model = costs(batch=dp)  # one micro-batch: the terms are the same
    strategy = Strategy(recompute=recompute, zero=2 if stays else 3)  # type: ignore[arg-type]
    planned = model.predict(Mesh(dp_shard=dp), 1, Strategy(zero=2), [(0, strategy)] * LAYERS)
    again = (lambda step: step.index < model.graph.bodies[0].rerun) if recompute == "full" else None
    priced = Arranged(model, Software(copies=True), again).price(at(dp=dp, zero=3, stays=stays))
    assert priced.step_time == pytest.approx(planned.step_time, rel=0.02)


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_stages_are_what_the_planner_simulates(pp: int, recompute: str) -> None:
    wide = CostModel(model(layers=LAYERS, hidden=1024, ffn=4096, seq=4096, vocab=1024), machine(), Workload(global_batch=64))
    strategy = Strategy(recompute=recompute)  # type: ignore[arg-type]
    cut = Cut("1f1b", 1, tuple(LAYERS // pp * k for k in range(1, pp)))
    planned = wide.predict(Mesh(pp=pp), 4, Strategy(), [(0, strategy)] * LAYERS, cut)
    again = (lambda step: step.index < wide.graph.bodies[0].rerun) if recompute == "full" else None
    priced = Arranged(wide, Software(copies=True), again).price(at(pp=pp, micro_batch=4, zero=3))
    # the planner's FSDP reads gradients once more to add them up: little, beside so many tokens
    assert planned.scheduled == pytest.approx(priced.step_time, rel=0.02)
    assert planned.scheduled * (1 - 1e-9) <= planned.step_time <= planned.scheduled * 1.1


def test_the_parts_of_the_outer_body_are_the_whole() -> None:
    pipeline = Arranged(costs())
    _, embed, head = pipeline.parts(at())
    whole = pipeline.costs.layer_cost(OUTER, UNSHARDED, 1, 1)
    assert embed.forward + head.forward == pytest.approx(whole.forward)
    assert embed.backward + head.backward == pytest.approx(whole.backward)
    assert embed.saved + head.saved == pytest.approx(whole.saved)
    assert {p.name for p in embed.parameters} | {p.name for p in head.parameters} == {p.name for p in whole.parameters}


@settings(max_examples=30)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.floats(1.0, 3.0), st.floats(1.0, 3.0))
def test_a_slower_framework_is_never_faster(pp: int, dp: int, compute: float, elementwise: float) -> None:
    model = costs()
    place = at(pp=pp, dp=dp)
    if pp > LAYERS:
        return
    neutral = Arranged(model).price(place).step_time
    slower = Software(compute=compute, elementwise=elementwise, step=1e-3, dp_exposed=0.5, layer=1e-4)
    assert neutral <= Arranged(model, slower).price(place).step_time


def test_neutral_software_changes_nothing() -> None:
    model = costs()
    assert Arranged(model, Software()).price(at(dp=2)) == Arranged(model).price(at(dp=2))


def test_recomputation_keeps_less_and_takes_longer() -> None:
    model = costs()
    kept, again = Arranged(model), Arranged(model, recomputed=lambda step: True)
    assert again.price(at()).step_time > kept.price(at()).step_time
    assert again.memory(at()) <= kept.memory(at())


def test_zero_1_shards_the_optimizer() -> None:
    pipeline = Arranged(costs(), Software(resident=6, sharded=12))
    assert pipeline.memory(at(dp=8, zero=1)) < pipeline.memory(at(dp=8, zero=0)) == pipeline.memory(at(zero=0))


def exposed(place: Arrangement, **own: float) -> float:
    return Arranged(costs(), Software(dp_exposed=1.0, **own)).price(place).exposed


def test_one_adapter_carries_the_reductions_of_some_ranks_of_a_node() -> None:
    """Of 2 ranks of each of 4 nodes, as of one rank of each; whole nodes, single ranks and what stays in a node are as ever."""
    some, one = at(tp=4, dp=8), at(tp=8, dp=4)
    assert exposed(some) < exposed(some, one_adapter=1.0) == pytest.approx(exposed(one))
    assert exposed(some, one_adapter=3.0) == pytest.approx(3 * exposed(one))
    for place in (one, at(dp=16), at(tp=2, dp=4)):
        assert exposed(place, one_adapter=3.0) == exposed(place) > 0


def test_gradients_in_half_the_bytes_are_reduced_in_half_the_time() -> None:
    place = at(dp=16)
    assert 0.4 < exposed(place, gradients=2.0) / exposed(place) < 0.7


def test_the_habits_of_zero_0_and_1_are_of_those_alone() -> None:
    piped = at(pp=2, dp=16)
    assert exposed(piped, piped_reduction=3.0) == pytest.approx(3 * exposed(piped))
    for place in (at(dp=16), at(pp=2, dp=4), replace(piped, zero=1)):
        assert exposed(place, piped_reduction=3.0) == exposed(place) > 0
    packed = replace(piped, zero=1)
    assert exposed(packed, zero_rank=1e-3) == pytest.approx(exposed(packed) + 15e-3)
    assert exposed(piped, zero_rank=1e-3) == exposed(piped)


def test_fsdp_copies_what_it_gathers_and_reduces() -> None:
    """Read and written: 2 + 2 bytes of a gathered parameter, 2 + 4 of its gradient; none of it without FSDP."""
    framework, place = Arranged(costs(), Software(copies=True)), at(dp=8, zero=3)
    block = framework.parts(place)[0]
    forward, backward = framework._copies(block, place)
    device = framework.costs.hardware.device
    assert forward == pytest.approx(memory_time(4 * numel(block), device))
    assert backward == pytest.approx(memory_time(10 * numel(block), device))
    assert framework._copies(block, replace(place, stays=True)) == pytest.approx((forward, backward - forward))
    assert framework.price(place).step_time > Arranged(costs()).price(place).step_time
    assert framework.price(at(dp=8)) == Arranged(costs()).price(at(dp=8))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UsageError, match="do not fill"):
        Arranged(costs()).price(at(pp=LAYERS + 1))
