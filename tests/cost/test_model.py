"""Laws of the cost model, whatever the numbers are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplan.cost.compute import memory_time
from autoplan.cost.layer import layer_cost
from autoplan.cost.model import OUTER, CostModel
from autoplan.cost.walk import walk
from autoplan.errors import UsageError
from autoplan.graph import Op, Value
from autoplan.plan import Prediction
from autoplan.search.columns import Tables
from autoplan.strategy import REPLICATE, UNSHARDED, Border, Layout, Mesh, Recompute, Sharding, Strategy, Within, Zero, shard
from autoplan.workload import Workload
from tests.bodies import mlp_block, model
from tests.hardware import machine, uneven

GRAPH = model(layers=4, hidden=1024, ffn=4096, seq=512, vocab=8192)
OUTER_PLAIN = Strategy(UNSHARDED, "none", zero=2)


def predict(
    mesh: Mesh, micro_batch: int = 1, global_batch: int = 64, strategy: Strategy | None = None, **hardware: float
) -> Prediction:
    costs = CostModel(GRAPH, machine(**hardware), Workload(global_batch=global_batch))  # type: ignore[arg-type]
    return costs.predict(mesh, micro_batch, OUTER_PLAIN, [(0, strategy or Strategy())] * 4)


dp_meshes = st.builds(Mesh, dp_replicate=st.sampled_from([1, 2, 4]), dp_shard=st.sampled_from([1, 2, 4, 8]))
strategies = st.builds(Strategy, st.just(UNSHARDED), st.sampled_from(get_args(Recompute)), st.sampled_from(get_args(Zero)))


@given(dp_meshes, strategies, st.sampled_from([1, 2]))
def test_the_parts_add_up(mesh: Mesh, strategy: Strategy, micro_batch: int) -> None:
    prediction = predict(mesh, micro_batch, strategy=strategy)
    assert prediction.step_time == pytest.approx(sum(seconds for _, seconds in prediction.time.items()), rel=1e-12)
    assert all(part >= 0 for _, part in [*prediction.time.items(), *prediction.memory.items()])
    assert 0 < prediction.mfu < 1


@given(dp_meshes, strategies)
def test_more_batch_never_takes_less_time(mesh: Mesh, strategy: Strategy) -> None:
    times = [predict(mesh, 1, batch, strategy).step_time for batch in (32, 64, 128)]
    assert times == sorted(times)


def test_only_who_shares_a_layer_pays_for_dtensors_and_for_waiting() -> None:
    load, plain = Workload(global_batch=64), replace(machine(), backend="gloo")
    for body in (0, OUTER):
        alone, beside = (
            CostModel(GRAPH, hardware, load).layer_cost(body, UNSHARDED, 1, 4) for hardware in (plain, uneven(plain))
        )
        assert alone == beside
        known = CostModel(GRAPH, plain, load).layer_cost(body, UNSHARDED, 4, 4)
        waits = CostModel(GRAPH, replace(plain, jitter=1e-3), load).layer_cost(body, UNSHARDED, 4, 4)
        spread = CostModel(GRAPH, uneven(plain), load).layer_cost(body, UNSHARDED, 4, 4)
        assert known.forward < waits.forward < spread.forward
        assert known.backward < waits.backward < spread.backward
        assert waits.forward / known.forward == pytest.approx(waits.backward / known.backward)
        assert waits.saved == known.saved


@pytest.mark.parametrize("stream", [REPLICATE, shard(1)], ids=str)
def test_calls_that_are_passed_over_cost_nothing(stream: Layout) -> None:
    costs = CostModel(model(layers=6, hidden=256, seq=64), machine(), Workload(global_batch=64))
    outer, passed = costs.layer_model(OUTER, 2, 1), costs.graph.outer.repeated
    assert len(passed) == 4
    shardings = Tables(costs).shardings(OUTER, Within(tp=2), 1, stream)
    assert len(shardings) > 1
    for sharding in shardings:
        every, some = list(walk(outer, sharding)), list(walk(outer, sharding, every=False))
        assert [step for step in every if step.index not in passed] == [step for step in some if step.index not in passed]
        assert len(some) < len(every)
    moved = Border("layers.2", "out", "0", stream, REPLICATE if stream.sharded else shard(1))
    with pytest.raises(UsageError, match=r"'layers\.3' expects"):
        list(walk(outer, replace(shardings[0], borders=(*shardings[0].borders, moved)), every=False))


@pytest.mark.parametrize("tp", [1, 4])
def test_a_sample_is_never_dearer_in_a_larger_micro_batch(tp: int) -> None:
    """What the search's bound on a family of micro-batches rests on."""
    costs = CostModel(GRAPH, uneven(machine()), Workload(global_batch=64))
    for body in (0, OUTER):
        seconds = []
        for micro_batch in (1, 2, 3, 4, 8):
            cost = costs.layer_cost(body, UNSHARDED, tp, micro_batch)
            seconds.append((cost.forward + cost.backward) / micro_batch)
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(seconds))


@given(dp_meshes, strategies, st.floats(1.0, 10.0))
def test_more_bandwidth_never_takes_longer(mesh: Mesh, strategy: Strategy, factor: float) -> None:
    slow = predict(mesh, strategy=strategy)
    assert predict(mesh, strategy=strategy, bandwidth=300e9 * factor).step_time <= slow.step_time * (1 + 1e-12)
    assert predict(mesh, strategy=strategy, network=25e9 * factor).step_time <= slow.step_time * (1 + 1e-12)


@given(strategies, st.sampled_from([1, 2]))
def test_state_memory_falls_with_dp_shard(strategy: Strategy, micro_batch: int) -> None:
    sizes = []
    for dp_shard in (1, 2, 4, 8, 16):
        memory = predict(Mesh(dp_shard=dp_shard), micro_batch, strategy=strategy).memory
        sizes.append(memory.parameters + memory.gradients + memory.awaited + memory.optimizer)
    assert all(b < a for a, b in itertools.pairwise(sizes))
    assert sizes[0] / sizes[3] == pytest.approx(8, rel=0.01)


def test_recompute_trades_activations_for_time() -> None:
    mesh = Mesh(dp_shard=8)
    kept, some, again = (predict(mesh, 4, strategy=Strategy(recompute=how)) for how in get_args(Recompute))
    assert again.memory.activations < some.memory.activations < kept.memory.activations
    assert again.step_time > some.step_time > kept.step_time
    assert again.time.recompute > some.time.recompute > 0
    assert kept.memory.recompute == 0


def test_zero_2_holds_what_zero_3_gathers_again() -> None:
    mesh = Mesh(dp_shard=8)
    zero3, zero2 = predict(mesh, strategy=Strategy()), predict(mesh, strategy=Strategy(zero=2))
    assert zero2.memory.unsharded > zero3.memory.unsharded
    assert zero2.step_time <= zero3.step_time


def test_without_tensor_parallelism_nothing_is_sent_over_tp() -> None:
    assert predict(Mesh(dp_shard=8)).time.tp_communication == 0
    assert predict(Mesh()).time.dp_communication == 0


@pytest.mark.parametrize(("zero", "forward", "backward"), [(3, 4, 4 + 6), (2, 4, 6), (1, 0, 0)])
def test_fsdp_copies_in_every_micro_batch_what_it_gathers_and_reduces(zero: Zero, forward: int, backward: int) -> None:
    """Bytes of a parameter in bf16 with reductions in float32; under level 1 all ten once a step, under tp alone none."""
    mesh, costs = Mesh(dp_shard=8), CostModel(GRAPH, machine(), Workload(global_batch=64))
    numel = sum(p.numel for p in GRAPH.bodies[0].parameters)
    device = costs.hardware.device
    step = costs.layer_step(0, Strategy(zero=zero), mesh, 1)
    assert step.copies == pytest.approx([memory_time(each * numel, device) for each in (forward, backward)])
    once = (4, 6) if zero == 1 else (0, 0)
    assert step.copies_once == pytest.approx([memory_time(each * numel, device) for each in once])
    alike = Workload(global_batch=64, param_dtype="float32", compute_dtype="float32", reduce_dtype="float32")
    alone = CostModel(GRAPH, machine(), alike).layer_step(0, Strategy(zero=zero), Mesh(tp=8), 1)
    assert (alone.copies, alone.copies_once, alone.dp_once) == ((0.0, 0.0), (0.0, 0.0), 0.0)


@settings(max_examples=20)
@given(st.sampled_from([2, 4, 8]), st.sampled_from([REPLICATE, shard(1)]))
def test_every_sharding_the_search_finds_costs_no_more_compute(tp: int, stream: object) -> None:
    tables = Tables(CostModel(GRAPH, machine(), Workload(global_batch=64)))
    whole = tables.costs.layer_cost(0, UNSHARDED, 1, 2)
    for sharding in tables.shardings(0, Within(tp), 2, stream):  # type: ignore[arg-type]
        cost = tables.costs.layer_cost(0, sharding, tp, 2)
        assert cost.forward <= whole.forward * (1 + 1e-12)
        assert sum(p.numel(1) for p in cost.parameters) <= sum(p.numel(1) for p in whole.parameters)


def test_exact_parameter_bytes_with_uneven_shards() -> None:
    """FSDP cuts dim 0 into equal chunks, the last ones shorter: the fullest rank holds the ceiling."""
    cost = layer_cost(CostModel(GRAPH, machine(), Workload(global_batch=64)).layer_model(0, 1, 1), UNSHARDED)
    norm = next(p for p in cost.parameters if p.name == "norm.weight")
    assert [norm.numel(n) for n in (1, 3, 7, 1024, 4096)] == [1024, 342, 147, 1, 1]


def test_an_illegal_sharding_is_refused_with_its_place() -> None:
    costs = CostModel(GRAPH, machine(), Workload(global_batch=64))
    half = Sharding((("up.weight", shard(0)),))
    with pytest.raises(UsageError, match="'linear' in module 'up' cannot run on inputs Replicate, Shard"):
        costs.layer_cost(0, half, 2, 1)


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="does not divide"):
        predict(Mesh(dp_shard=8), micro_batch=3, global_batch=64)


def test_a_dtype_the_hardware_does_not_know_is_refused() -> None:
    with pytest.raises(UsageError, match="no peak for float16"):
        CostModel(GRAPH, machine(), Workload(global_batch=8, compute_dtype="float16"))


def test_saved_bytes_of_a_body_are_those_of_its_unsharded_cost() -> None:
    body = mlp_block(hidden=256, seq=64)
    graph = replace(GRAPH, bodies=(body,))
    cost = CostModel(graph, machine(), Workload(global_batch=8)).layer_cost(0, UNSHARDED, 1, 3)
    assert cost.saved == body.saved.at(3)


def test_a_tensor_that_nobody_keeps_takes_room_while_it_is_there() -> None:
    body = mlp_block(hidden=256, seq=64)
    zeros = Value(len(body.values), (10**9,), "float32", None, False, len(body.values))
    made = Op("opaque", "zeros", "", (), (zeros.id,))
    larger = replace(body, values=(*body.values, zeros), ops=(made, *body.ops))
    plain, other = (
        CostModel(replace(GRAPH, bodies=(each,)), machine(), Workload(global_batch=8)).layer_cost(0, UNSHARDED, 1, 1)
        for each in (body, larger)
    )
    assert plain.peak < 1e9
    assert 4e9 <= other.peak < 4e9 + plain.peak
    assert other.saved == plain.saved
