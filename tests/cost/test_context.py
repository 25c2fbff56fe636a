"""Sequences: what can be cut along them, what stops it, and what it is worth."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

import autoplan
from autoplan.constraints import Constraints
from autoplan.cost.context import Context, context_inputs, misplaced
from autoplan.cost.model import CostModel
from autoplan.cost.rules import Outcome
from autoplan.graph import Graph, Op
from autoplan.plan import Plan
from autoplan.search.planner import search
from autoplan.search.space import combined, meshes
from autoplan.strategy import CP_KINDS, REPLICATE, UNSHARDED, Mesh, Strategy, shard
from autoplan.workload import Workload
from tests.hardware import machine

CHANGES = {"layers": 2, "hidden": 64, "heads": 8, "kv_heads": 4, "ffn": 128, "vocab": 128, "seq_len": 96}


@cache
def llama(seq_len: int = 96) -> Graph:
    return autoplan.inspect(autoplan.load_model("examples/llama.py", **{**CHANGES, "seq_len": seq_len}))


def with_op(graph: Graph, position: int, op: Op) -> Graph:
    body = graph.bodies[0]
    ops = (*body.ops[:position], op, *body.ops[position + 1 :])
    return replace(graph, bodies=(replace(body, ops=ops),))


def test_tokens_are_cut_along_the_sequence() -> None:
    assert context_inputs(llama()) == (("input_ids", 1), ("labels", 1))
    assert Context(llama()).reason == ""


@pytest.mark.parametrize(
    ("cp", "tp", "reason"),
    [
        (1, 1, ""),
        (2, 1, ""),
        (4, 1, ""),
        (2, 2, ""),
        (3, 1, "8 heads"),
        (8, 1, ""),
        (16, 1, "8 heads"),
        (4, 2, ""),
        (8, 2, "cp 8 x tp 2"),
    ],
)
def test_heads_and_positions_must_divide(cp: int, tp: int, reason: str) -> None:
    told = Context(llama()).refusal(cp, tp)
    assert reason in told
    assert bool(told) == bool(reason)


def test_positions_must_divide() -> None:
    assert Context(llama(98)).refusal(2, 1) == ""
    assert "98 positions of 'embedding' do not divide over cp 4" in Context(llama(98)).refusal(4, 1)


def test_an_operation_over_positions_is_named() -> None:
    graph = llama()
    position, norm = next((i, op) for i, op in enumerate(graph.bodies[0].ops) if op.kind == "norm")
    mixing = replace(norm, kind="opaque", name="cumulate")
    reason = Context(with_op(graph, position, mixing)).reason
    assert reason == "'cumulate' in 'layers.0.attention_norm' takes all positions at once"
    along = replace(norm, kind="along", name="cumsum", inputs=norm.inputs[:1], dims=(1,))
    assert "'cumsum'" in Context(with_op(graph, position, along)).reason
    assert Context(with_op(graph, position, replace(along, dims=(2,)))).reason == ""


def test_a_graph_without_tokens_or_attention_is_refused() -> None:
    graph = llama()
    assert "no input" in Context(replace(graph, inputs=())).reason


def test_cutting_divides_work_and_activations_and_costs_exchanges() -> None:
    costs = CostModel(llama(), machine(), Workload(global_batch=8))
    one, two = (costs.layer_cost(0, UNSHARDED, 1, 4, cp) for cp in (1, 2))
    half = costs.layer_cost(0, UNSHARDED, 1, 2)
    assert (two.forward, two.backward, two.saved) == (half.forward, half.backward, half.saved)
    assert one.tp_forward == one.tp_backward == 0.0
    assert 0.0 < two.tp_forward == two.tp_backward
    step = costs.layer_step(0, Strategy(), Mesh(cp=2), 4)
    assert step.state_bytes == costs.layer_step(0, Strategy(), Mesh(dp_shard=2), 4).state_bytes


def test_meshes_combine_cp_and_tp() -> None:
    found = list(meshes(8, {}, (1, 2, 4, 8)))
    assert {(mesh.cp, mesh.tp) for mesh in found} >= {(1, 8), (8, 1), (2, 2), (2, 4), (4, 2)}
    assert len(set(found)) == len(found)
    assert all(mesh.size == 8 for mesh in found)


def test_the_planner_combines_cp_and_tp_where_heads_allow_it() -> None:
    wish = {"cp": 2, "tp": 2}
    plan = search(llama(), machine(), Workload(global_batch=2), gpus=4, fixed=wish)
    assert plan.mesh == Mesh(cp=2, tp=2)
    assert plan.context == (("input_ids", 1), ("labels", 1))
    free = search(llama(), machine(), Workload(global_batch=16), gpus=16)
    reasons = [candidate.reason for candidate in free.candidates if candidate.mesh.cp > 1 and candidate.mesh.tp > 1]
    assert any("do not divide over cp 8 x tp 2" in reason for reason in reasons)


def test_experts_are_not_combined_with_cp_and_tp() -> None:
    graph = autoplan.inspect(autoplan.load_model("examples/moe.py", **CHANGES, size="1B", experts=8, chosen=2))
    wish = 4, {"pp": 1, "dp_replicate": 1}, (1, 2), (1,)
    both = Mesh(cp=2, tp=2)
    assert both in combined(*wish, CostModel(llama(), machine(), Workload(global_batch=2)))[0]
    possible, refused = combined(*wish, CostModel(graph, machine(), Workload(global_batch=2)))
    assert Mesh(dp_shard=2, cp=2) in possible
    assert both not in possible
    assert [(each.mesh, each.reason) for each in refused] == [(both, "experts and cp x tp are not run together yet")]


def test_learned_positions_are_not_cut_over_tp_where_cp_cuts_what_they_meet() -> None:
    """Each rank of tp would have rows of the whole sequence, not of its part."""
    graph = autoplan.inspect(autoplan.load_model("examples/gpt.py", layers=2, hidden=64, heads=8, vocab=128, seq_len=96))
    ((at, gathers),) = ((at, some) for at, some in Context(graph).gathered.items() if any(each.backward for each in some))
    op = graph.outer.ops[at[1]]
    for positions, wrong in ((REPLICATE, False), (shard(1), False), (shard(0), True)):
        inputs = tuple(positions if i == gathers[0].value else shard(positions.dim + 1) for i in op.inputs)
        assert misplaced(gathers, op, Outcome(inputs, inputs[:1], True)) == wrong


def test_long_sequences_are_cut_where_there_is_one_for_many_devices() -> None:
    """Two sequences for four devices, whose activations do not fit into one."""
    plan = search(llama(), machine(), Workload(global_batch=2), gpus=4, fixed={"tp": 1, "pp": 1})
    assert plan.mesh.cp == 2
    assert plan.context == (("input_ids", 1), ("labels", 1))
    refused = search(llama(100), machine(), Workload(global_batch=24), gpus=24)
    reasons = [c.reason for c in refused.candidates if c.status == "illegal"]
    assert any("8 heads of attention in 'layers.0.attention' do not divide over cp 3" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("cp", "tp", "reason"),
    [(2, 1, ""), (3, 1, ""), (16, 1, ""), (32, 1, "96 positions of 'embedding' do not divide over twice cp 32"), (2, 2, "tp")],
)
def test_in_a_ring_positions_alone_must_divide(cp: int, tp: int, reason: str) -> None:
    told = Context(llama()).refusal(cp, tp, "ring")
    assert reason in told
    assert bool(told) == bool(reason)


def test_masks_and_dropout_are_refused_in_a_ring() -> None:
    graph = llama()
    position, attention = next((i, op) for i, op in enumerate(graph.bodies[0].ops) if op.kind == "attention")
    dropping = Context(with_op(graph, position, replace(attention, dropout=True)))
    assert dropping.refusal(2, 1, "ring") == "attention in 'layers.0.attention' drops weights out"
    masked = Context(with_op(graph, position, replace(attention, inputs=(*attention.inputs, attention.inputs[0]))))
    assert "a mask of attention" in masked.refusal(2, 1, "ring")
    assert dropping.kinds(2, 1) == masked.kinds(2, 1) == ("ulysses",)
    assert Context(graph).kinds(2, 1) == ("ulysses", "ring")
    assert Context(graph).kinds(3, 1) == ("ring",)
    assert Context(graph).kinds(1, 1) == ("ulysses",)


def test_dropout_is_captured_and_old_fingerprints_hold() -> None:
    graph = llama()
    position, attention = next((i, op) for i, op in enumerate(graph.bodies[0].ops) if op.kind == "attention")
    assert not attention.dropout
    assert with_op(graph, position, replace(attention, dropout=True)).fingerprint != graph.fingerprint


def test_the_planner_takes_the_kind_that_is_legal() -> None:
    """Three devices for one sequence: its eight heads do not divide."""
    plan = search(llama(), machine(), Workload(global_batch=1), gpus=3, fixed={"cp": 3})
    assert (plan.mesh.cp, plan.mesh.cp_kind) == (3, "ring")
    assert "ring cp 3" in str(plan.mesh)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_planner_takes_the_cheaper_kind(batch: int) -> None:
    def best(kinds: list[int | str]) -> Plan:
        only = Constraints(only={"cp_kind": kinds})
        return search(llama(), machine(), Workload(global_batch=batch), gpus=8, fixed={"cp": 8}, constraints=only)

    free, apart = best(["ulysses", "ring"]), [best([kind]) for kind in CP_KINDS]
    assert [plan.mesh.cp_kind for plan in apart] == ["ulysses", "ring"]
    cheaper = min(apart, key=lambda plan: plan.prediction.step_time)
    assert (free.mesh, free.prediction) == (cheaper.mesh, cheaper.prediction)


def test_a_ring_hides_its_messages_behind_long_sequences() -> None:
    def sent(seq_len: int) -> tuple[float, float]:
        cost = CostModel(llama(seq_len), machine(), Workload(global_batch=8)).layer_cost(0, UNSHARDED, 1, 1, 4, cp_kind="ring")
        return cost.tp_forward / cost.forward, cost.tp_backward / cost.backward

    short, long = sent(96), sent(960_000)
    assert long[0] < short[0] / 10
    assert long[1] < short[1] / 10
