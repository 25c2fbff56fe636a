"""What a backward pass leaves for later: seconds and bytes of linears alone, and what a stage then holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoplan.cost.late import Late, late
from autoplan.cost.model import OUTER, CostModel, Cut
from autoplan.cost.prices import LayerModel
from autoplan.graph import Body, Cost
from autoplan.strategy import REPLICATE, UNSHARDED, Mesh, Strategy, shard
from autoplan.workload import Workload
from tests.bodies import mlp_block, model
from tests.hardware import machine

HIDDEN, FFN, SEQ = 1024, 4096, 512
GRAPH = model(layers=8, hidden=HIDDEN, ffn=FFN, seq=SEQ, vocab=8192)
COSTS = CostModel(GRAPH, machine(), Workload(global_batch=64))
MESH = Mesh(pp=4)


def of(body: Body, micro_batch: int = 2, tp: int = 1) -> tuple[LayerModel, Late]:
    layer = LayerModel(body, (body,), (), tp=tp, micro_batch=micro_batch, hardware=machine(), dtype="bfloat16")
    return layer, late(layer, UNSHARDED)


def test_half_of_the_backward_pass_of_linears_comes_late() -> None:
    layer, left = of(mlp_block(hidden=HIDDEN, ffn=FFN, seq=SEQ))
    linears = [op for op in layer.body.ops if op.kind == "linear"]
    assert len(linears) == 2
    rows = 2 * 2 * SEQ  # bytes of one feature
    assert left.weights == 2 * HIDDEN * FFN
    assert left.bytes == 2 * rows * (HIDDEN + FFN), "of both inputs, and of the gradients of both outputs"
    cost = COSTS.layer_cost(0, UNSHARDED, 1, 2)
    assert left.seconds == pytest.approx(cost.products[1] / 2)


def test_a_linear_whose_input_needs_no_gradient_is_all_late() -> None:
    body = mlp_block(hidden=HIDDEN, ffn=FFN, seq=SEQ)
    ops = tuple(replace(op, backward_flops=op.forward_flops) if op.kind == "linear" else op for op in body.ops)
    layer, left = of(replace(body, ops=ops))
    assert left.seconds == pytest.approx(sum(layer._price(i, s).backward for i, s in linears_of(layer)))
    none = tuple(replace(op, backward_flops=Cost()) if op.kind == "linear" else op for op in body.ops)
    assert of(replace(body, ops=none))[1].seconds == 0.0


def linears_of(layer: LayerModel):  # type: ignore[no-untyped-def]
    from autoplan.cost.walk import walk

    return [(step.index, step.outcome) for step in walk(layer, UNSHARDED) if step.op.kind == "linear"]


def test_frozen_weights_leave_nothing() -> None:
    body = mlp_block(hidden=HIDDEN, ffn=FFN, seq=SEQ)
    frozen = replace(body, parameters=tuple(replace(p, trainable=False) for p in body.parameters))
    assert of(frozen)[1] == Late()


@pytest.mark.parametrize("stream", [REPLICATE, shard(1)], ids=str)
def test_a_share_over_tp_is_no_more_than_the_whole(stream: object) -> None:
    from autoplan.search.shardings import pareto_shardings

    model_of, whole = COSTS.layer_model(0, 4, 2), late(COSTS.layer_model(0, 1, 2), UNSHARDED)
    for sharding in pareto_shardings(model_of, stream):  # type: ignore[arg-type]
        left = late(model_of, sharding)
        assert whole.bytes / 4 <= left.bytes <= whole.bytes
        assert left.weights <= whole.weights


def test_every_stage_holds_what_it_has_not_done_yet() -> None:
    """Stage s has p - s micro-batches in flight, as under 1f1b, and s that wait; so do all of them about as much."""
    strategies = [(block.body, Strategy()) for block in GRAPH.blocks]
    cuts = {kind: Cut(kind, 1, (2, 4, 6)) for kind in ("1f1b", "zero-bubble")}  # type: ignore[arg-type]
    found = {kind: COSTS.predict(MESH, 1, Strategy(), strategies, cut) for kind, cut in cuts.items()}
    step, left = COSTS.layer_step(0, Strategy(), MESH, 1), late(COSTS.layer_model(0, 1, 1), UNSHARDED)
    for s, (one, split) in enumerate(zip(found["1f1b"].stages, found["zero-bubble"].stages, strict=True)):
        assert split.weights[0] == pytest.approx(2 * left.seconds + (late_head() if s == 3 else 0.0))
        assert split.backward == one.backward
        waiting = 2 * s * min(left.bytes, step.kept)
        assert split.memory.total >= one.memory.total + waiting * (1 - 1e-9)
    assert found["zero-bubble"].step_time < found["1f1b"].step_time
    assert found["zero-bubble"].scheduled <= found["zero-bubble"].step_time * (1 + 1e-9)  # type: ignore[operator]


def late_head() -> float:
    regions = COSTS.outer.within(6, 8)
    return late(COSTS.layer_model(OUTER, 1, 1), UNSHARDED, frozenset(regions), COSTS.outer.regions).seconds


def test_with_layers_that_run_again_stages_wait_longer() -> None:
    plain, again = (COSTS.share("zero-bubble", 1, MESH, 1, again=again) for again in (False, True))
    assert 1 / 3 <= plain < again < 1
    assert COSTS.share("interleaved-1f1b", 4, MESH, 1) == 0.25
