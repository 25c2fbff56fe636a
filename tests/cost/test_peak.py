"""The peak of a layer's backward pass against its definition: at every operation, what is there then."""

from __future__ import annotations

import pytest

from autoplan.cost.layer import layer_cost
from autoplan.cost.model import OUTER, CostModel
from autoplan.cost.peak import made
from autoplan.cost.prices import LayerModel
from autoplan.cost.rank import Held, held_layers, memory
from autoplan.cost.walk import walk
from autoplan.graph import Body
from autoplan.search.shardings import pareto_shardings
from autoplan.strategy import REPLICATE, UNSHARDED, Layout, Mesh, Sharding, Strategy, shard
from autoplan.workload import Workload
from tests.bodies import mlp_block, model
from tests.hardware import machine

GRAPH = model(layers=4, hidden=1024, ffn=4096, seq=512, vocab=8192)
COSTS = CostModel(GRAPH, machine(), Workload(global_batch=64))


def at_every_operation(layer: LayerModel, sharding: Sharding) -> list[float]:
    """Bytes while the backward pass of each operation runs, those of its own gradients and of all that run before it included."""
    steps, values = list(walk(layer, sharding)), layer.body.values
    layouts = {i: layout for step in steps for i, layout in zip(step.op.inputs, step.outcome.inputs, strict=True)}
    found = []
    for k, step in enumerate(steps):
        if step.op.kind in ("enter", "exit"):
            continue
        saved = layer_cost(layer, sharding, lambda other, k=k: other.index <= k).saved  # type: ignore[misc]
        gradients = sum(made(layer, other.index, other.outcome) for other in steps[k:])
        before = {i for other in steps[:k] for i in other.op.outputs} | set(layer.body.inputs)
        later = {i for other in steps[k + 1 :] for i in other.op.inputs} | set(layer.body.outputs)
        waits = {values[i].storage: layer.local_bytes(values[i], layouts[i]) for i in before & later if values[i].requires_grad}
        found.append(saved + layer.op(step.index, step.outcome).temporary + sum(waits.values()) + gradients)
    return found


@pytest.mark.parametrize("body", [mlp_block(), mlp_block(norm=False), mlp_block(hidden=512, ffn=64, seq=2048)])
def test_the_peak_is_the_fullest_moment(body: Body) -> None:
    layer = LayerModel(body, (body,), (), tp=1, micro_batch=3, hardware=machine(), dtype="bfloat16")
    cost = layer_cost(layer, UNSHARDED)
    raw = 2.0 * sum(p.numel(1) for p in cost.parameters)
    assert cost.peak == pytest.approx(max(at_every_operation(layer, UNSHARDED)), rel=1e-12)
    assert max(cost.saved, raw) < cost.peak, "something is held besides"
    assert cost.beneath == 0.0


@pytest.mark.parametrize("stream", [REPLICATE, shard(1)], ids=str)
def test_gradients_are_not_beside_all_that_was_saved(stream: Layout) -> None:
    layer = COSTS.layer_model(0, 4, 2)
    for sharding in pareto_shardings(layer, stream):
        cost = layer_cost(layer, sharding)
        largest = max(layer.op(s.index, s.outcome).temporary for s in walk(layer, sharding) if s.op.kind not in ("enter", "exit"))
        assert cost.saved < cost.peak < cost.saved + 2.0 * sum(p.numel(1) for p in cost.parameters) + 4 * largest


def test_beneath_the_layers_are_what_came_before_and_gradients_of_what_comes_after() -> None:
    cost = COSTS.layer_cost(OUTER, UNSHARDED, 1, 2)
    calls = [index for index, op in enumerate(GRAPH.outer.ops) if op.kind == "call"]
    outer = COSTS.layer_model(OUTER, 1, 2)
    before = layer_cost(outer, UNSHARDED, lambda step: step.index < calls[0]).saved
    head = layer_cost(outer, UNSHARDED, lambda step: step.index > calls[-1])
    assert cost.beneath == before + 2.0 * sum(p.numel(1) for p in head.parameters)
    assert head.beneath == 2.0 * sum(p.numel(1) for p in head.parameters)


def test_a_layer_is_beside_the_largest_window_of_its_neighbours() -> None:
    mesh = Mesh(dp_shard=8)
    three, one = (COSTS.layer_step(0, Strategy(UNSHARDED, "full" if zero == 3 else "none", zero), mesh, 2) for zero in (3, 1))
    assert one.window == 0.0 < three.window
    outer = COSTS.layer_step(OUTER, Strategy(UNSHARDED, "none", 2), mesh, 2)
    each = [memory([*held_layers([(0, step, 2)], 0, 1), Held(outer, 1)], [1], 0.0).total for step in (three, one)]
    together = memory([*held_layers([(0, three, 1), (0, one, 1)], 0, 1), Held(outer, 1)], [1], 0.0)
    inside = max(one.inside + one.reducing, three.inside - one.kept + max(three.reducing, one.buffer))
    held = sum(step.bytes(1) for step in (three, one, outer))
    assert together.total == pytest.approx(max(held + max(inside + three.window, outer.alone), sum(
        step.bytes(0) for step in (three, one, outer)) + outer.ending))  # fmt: skip
    assert together.total > min(each)


def test_a_buffer_is_whole_beside_a_layer_whose_neighbour_differs() -> None:
    """What the neighbour kept is counted as freed, so that the buffer with its gradients can't be in its place."""
    mesh = Mesh(dp_shard=8)
    full, none = (COSTS.layer_step(0, Strategy(UNSHARDED, again, 3), mesh, 2) for again in ("full", "none"))
    assert none.reducing < none.buffer
    first, last = held_layers([(0, full, 3), (0, none, 2)], 0, 1)
    assert (first.freed, first.after) == (2 * none.kept, none.buffer)
    assert (last.freed, last.after) == (0.0, 0.0)
