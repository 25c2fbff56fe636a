"""What the user asks of axes, layers and parameters is kept, and costs what it must."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from autoplan.constraints import Constraints, LayerWish
from autoplan.cost.model import CostModel
from autoplan.errors import NothingFits, UsageError
from autoplan.files.constraints import load_constraints
from autoplan.plan import Plan
from autoplan.search.planner import plans, search
from autoplan.search.space import meshes
from autoplan.strategy import DEGREES, PARTIAL, shard
from autoplan.workload import Workload
from tests.bodies import model
from tests.hardware import machine

GRAPH = model(layers=4, hidden=1024, ffn=4096, seq=512, vocab=8192)
LOAD = Workload(global_batch=16)
TIGHT = machine(memory=1.0e9)


def planned(constraints: Constraints) -> Plan:
    plan = search(GRAPH, TIGHT, LOAD, gpus=8, constraints=constraints)
    again = CostModel(GRAPH, TIGHT, LOAD).predict_plan(plan)
    assert plan.graph == GRAPH.fingerprint
    assert again.step_time == pytest.approx(plan.prediction.step_time, rel=1e-9)
    return plan


FREE = planned(Constraints())


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(never={"pp": [FREE.mesh.pp], "dp_shard": [FREE.mesh.dp_shard]}),
        Constraints(only={"micro_batch": [2]}),
        Constraints(only={"pp": [4], "schedule": ["gpipe"]}),
    ],
    ids=str,
)
def test_choices_are_kept(constraints: Constraints) -> None:
    plan = planned(constraints)
    assert all(constraints.allows(axis, getattr(plan.mesh, axis)) for axis in ("pp", "dp_shard"))
    assert constraints.allows("micro_batch", plan.micro_batch)
    assert plan.pipeline is None or constraints.allows("schedule", plan.pipeline.schedule)
    assert plan.prediction.step_time >= FREE.prediction.step_time * (1 - 1e-4)
    assert plan.solve.status == "optimal"


def test_a_choice_that_is_no_choice_changes_nothing() -> None:
    same = planned(Constraints(only={"dp_shard": [FREE.mesh.dp_shard]}))
    assert same.prediction.step_time == pytest.approx(FREE.prediction.step_time, rel=1e-4)


def test_layers_do_what_is_asked_of_them() -> None:
    plan = planned(Constraints(layers={"*": LayerWish(recompute="none"), "layers.2": LayerWish(recompute="full")}))
    assert {name: strategy.recompute for name, strategy in plan.layers()} == {
        "layers.0": "none", "layers.1": "none", "layers.2": "full", "layers.3": "none",
    }  # fmt: skip
    everything = planned(Constraints(layers={"*": LayerWish(recompute="full", zero=3)}))
    assert {(s.recompute, s.zero) for _, s in everything.layers()} == {("full", 3)}
    assert everything.prediction.step_time > FREE.prediction.step_time


def test_parameters_get_the_layout_that_is_asked_for() -> None:
    asked = Constraints(only={"tp": [2]}, parameters={"layers.1.up.weight": str(shard(0)), "layers.2.up.weight": "Replicate"})
    placed = dict(planned(asked).layers())
    assert placed["layers.1"].sharding.layout("up.weight") == shard(0)
    assert not placed["layers.2"].sharding.layout("up.weight").sharded


def test_a_layout_that_no_rule_allows_leaves_no_plan() -> None:
    with pytest.raises(NothingFits):
        search(GRAPH, TIGHT, LOAD, gpus=8, constraints=Constraints(only={"tp": [2]}, parameters={"*.up.weight": str(PARTIAL)}))


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no layer is called 'layer\.0'"):
        search(GRAPH, TIGHT, LOAD, gpus=8, constraints=Constraints(layers={"layer.0": LayerWish(recompute="full")}))
    with pytest.raises(UsageError, match="no parameter is called"):
        search(GRAPH, TIGHT, LOAD, gpus=8, constraints=Constraints(parameters={"*.gate.weight": "Replicate"}))


def test_a_file_of_constraints(tmp_path: Path) -> None:
    path = tmp_path / "wishes.yaml"
    path.write_text("only: {tp: [1, 2]}\nlayers:\n  'layers.*': {recompute: full}\nparameters: {head.weight: Shard(0)}\n")
    found = load_constraints(path)
    assert found.allows("tp", 2)
    assert not found.allows("tp", 4)
    assert found.layers == {"layers.*": LayerWish(recompute="full")}
    for text, message in (
        ("only: {tq: [1]}", "no choice of 'tq'"),
        ("only: {schedule: [1f1b, gpip]}", "schedule 'gpip' is none of gpipe, 1f1b"),
        ("layers: {a: {recompute: some}}", "recompute"),
        ("without: 1", "'without' is not a known key"),
        ("parameters: {a: Shard}", "'Shard' is no layout"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            load_constraints(path)


def test_the_next_best_meshes_are_the_next_best() -> None:
    """Every plan of the list is what a search finds on its mesh alone, and no other mesh has a faster one."""
    found = plans(GRAPH, TIGHT, LOAD, 3, gpus=4)
    assert [p.prediction.step_time for p in found] == sorted(p.prediction.step_time for p in found)
    assert len({p.mesh for p in found}) == 3
    every = []
    for mesh in meshes(4, {}):
        with suppress(NothingFits):
            fixed = {axis: getattr(mesh, axis) for axis in DEGREES}
            every.append(search(GRAPH, TIGHT, LOAD, gpus=4, fixed=fixed).prediction)
    best = sorted(prediction.step_time for prediction in every)[:3]
    assert [p.prediction.step_time for p in found] == pytest.approx(best, rel=1e-4)
    assert found[0].solve.status == "optimal"
    assert all(p.solve.bound <= found[0].prediction.step_time for p in found)


def test_on_one_device_what_is_cast_stays_where_there_is_room() -> None:
    """And gradients stay whole; where there is no room for both, some layers do without."""
    only = Constraints(only={"micro_batch": [1]}, layers={"*": LayerWish(recompute="none")})
    roomy = search(GRAPH, machine(), LOAD, gpus=1, constraints=only)
    assert {strategy.zero for _, strategy in roomy.layers()} == {1}
    assert roomy.prediction.time.dp_communication == 0
    tight = search(GRAPH, machine(memory=roomy.prediction.memory.total - 1e6), LOAD, gpus=1, constraints=only)
    assert any(strategy.zero > 1 for _, strategy in tight.layers())
    assert roomy.prediction.step_time < tight.prediction.step_time
    everywhere = search(GRAPH, machine(), LOAD, gpus=1, constraints=Constraints(only=only.only, layers={"*": LayerWish(zero=3)}))
    assert tight.prediction.step_time <= everywhere.prediction.step_time * (1 + 1e-4)
