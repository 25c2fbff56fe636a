"""The event simulation of whole plans beside their price, and what a plan's file says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autoplan.cost import events
from autoplan.cost.model import CostModel
from autoplan.cost.simulated import predicted, simulated, step_of
from autoplan.errors import UsageError
from autoplan.files.plan import dump_plan, load_plan
from autoplan.plan import LayerRun, Pipeline, Plan
from autoplan.schedule import ScheduleKind
from autoplan.search.planner import search
from autoplan.strategy import UNSHARDED, Mesh, Strategy, Zero
from autoplan.verify.expected import expected_traffic
from autoplan.workload import Workload
from tests.bodies import model
from tests.hardware import machine

GRAPH = model(layers=8, hidden=2048, ffn=8192, seq=2048, vocab=8192)
COSTS = CostModel(GRAPH, machine(), Workload(global_batch=32))


@pytest.fixture(scope="module")
def found() -> Plan:
    return search(GRAPH, COSTS.hardware, COSTS.workload, gpus=8)


def by_hand(found: Plan, mesh: Mesh, layer: Strategy, schedule: Pipeline | None = None, batch: int = 32, outer: Zero = 2) -> Plan:
    """Every layer alike."""
    names = tuple(block.name for block in GRAPH.blocks)
    plan = replace(
        found,
        mesh=mesh,
        micro_batch=1,
        workload=replace(found.workload, global_batch=batch),
        strategies=(("layer", layer), ("outer", Strategy(UNSHARDED, "none", outer))),
        outer="outer",
        runs=(LayerRun(layers=names, strategy="layer"),),
        pipeline=schedule,
    )
    return replace(plan, prediction=predicted(COSTS.with_batch(batch), plan))


def apart(plan: Plan) -> float:
    assert plan.prediction.simulated is not None
    return plan.prediction.simulated / plan.prediction.step_time - 1


def test_a_plan_carries_its_event_simulation(found: Plan) -> None:
    assert found.prediction.simulated == events.seconds(step_of(found))
    assert abs(apart(found)) < 0.05
    assert simulated(COSTS, found) == found.prediction


def test_the_file_tells_the_whole_step(found: Plan, tmp_path: Path) -> None:
    plan = by_hand(found, Mesh(pp=2, dp_shard=4), Strategy(recompute="full"), Pipeline(split_before=(GRAPH.blocks[3].name,)))
    path = tmp_path / "plan.yaml"
    path.write_text(dump_plan(plan))
    read = load_plan(path)
    assert read.prediction == plan.prediction
    assert events.events(step_of(read)) == events.events(step_of(plan))
    assert dump_plan(read) == path.read_text()


def test_units_that_hang_together_alone_are_read(found: Plan, tmp_path: Path) -> None:
    path, text = tmp_path / "plan.yaml", dump_plan(found)
    path.write_text(text.replace("  - before: ", "  - layers: x\n    before: ", 1))
    with pytest.raises(UsageError, match=r"prediction\.units\.\d is of some layers, or before or after one layer"):
        load_plan(path)


def test_on_one_device_it_is_the_price(found: Plan) -> None:
    for again in ("none", "full"):
        assert apart(by_hand(found, Mesh(), Strategy(recompute=again))) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("mesh", [Mesh(dp_shard=8), Mesh(dp_shard=64), Mesh(dp_replicate=2, dp_shard=4), Mesh(dp_replicate=8)])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_with_data_parallelism_it_is_near_the_price(found: Plan, mesh: Mesh, zero: int) -> None:
    """Apart by some layers' communication of every micro-batch, of eight layers and the outer body."""
    plan = by_hand(found, mesh, Strategy(zero=zero), batch=2 * mesh.size)  # type: ignore[arg-type]
    layer, outside, _ = plan.prediction.units
    sent = layer.gather + layer.reduce + layer.all_reduce + outside.gather + outside.reduce
    assert plan.prediction.simulated is not None
    assert abs(plan.prediction.simulated - plan.prediction.step_time) <= plan.micro_batches * sent


@pytest.mark.parametrize("batch", [4, 32])
def test_a_pipeline_alone_is_its_schedules_timeline(found: Plan, batch: int) -> None:
    """But for the optimizer, which each rank runs when it has ended, and not when the slowest has."""
    starts = tuple(GRAPH.blocks[i].name for i in (2, 4, 6))
    plan = by_hand(found, Mesh(pp=4), Strategy(), Pipeline(split_before=starts), batch, outer=3)
    prediction = plan.prediction
    assert prediction.simulated is not None
    assert prediction.scheduled is not None
    once = max(sum(p.unit.optimizer for p in stage) for stage in step_of(plan).stages)
    assert prediction.scheduled - once <= prediction.simulated * (1 + 1e-5)
    assert prediction.simulated <= prediction.scheduled * (1 + 1e-5)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(
    ("pp", "schedule"), [(1, "1f1b"), (2, "1f1b"), (2, "gpipe"), (2, "interleaved-1f1b"), (2, "zero-bubble")]
)
def test_it_gathers_and_reduces_as_often_as_dry_runs_count(found: Plan, zero: Zero, pp: int, schedule: ScheduleKind) -> None:
    """`verify` holds what is expected against what PyTorch really sends."""
    chunks = 2 if schedule == "interleaved-1f1b" else 1
    names = [block.name for block in GRAPH.blocks]
    starts = tuple(names[k * 8 // (pp * chunks)] for k in range(1, pp * chunks))
    pipeline = Pipeline(schedule=schedule, chunks=chunks, split_before=starts) if pp > 1 else None
    plan = by_hand(found, Mesh(pp=pp, dp_replicate=2, dp_shard=4), Strategy(zero=zero), pipeline)
    shown = events.events(step_of(plan))
    for rank in range(pp):
        sent = expected_traffic(plan, COSTS, rank)
        said = {stream: sum((e.rank, e.stream) == (rank, stream) for e in shown) for stream in ("gather", "reduce", "all_reduce")}
        assert said["gather"] == sent["dp_shard", "all_gather"].count
        assert said["reduce"] == sent["dp_shard", "reduce_scatter"].count
        assert said["all_reduce"] == sent["dp_replicate", "all_reduce"].count - 1, "that one is of the loss"


def test_what_stands_outside_is_computed_where_it_stands(found: Plan) -> None:
    plan = by_hand(found, Mesh(dp_shard=8), Strategy(), batch=8)
    names = [e.name for e in events.events(step_of(plan)) if e.stream == "compute"]
    first, last = GRAPH.blocks[0].name, GRAPH.blocks[-1].name
    assert names[:4] == [f"before {first} unpack", f"before {first} forward", f"{first} unpack", f"{first} forward"]
    end = names.index(f"{last} forward")
    middle = [f"after {last} forward", f"after {last} backward", f"{last} unpack", f"{last} backward", f"{last} pack"]
    assert names[end + 1 : end + 6] == middle
    units = {unit.place: unit for unit in plan.prediction.units}
    assert units["after"].gather == 0 < units["before"].gather, "parameters outside are gathered in one"
    assert units["after"].forward > units["before"].forward


def test_a_model_without_layers_is_one_unit(tmp_path: Path) -> None:
    plan = search(model(layers=0), COSTS.hardware, COSTS.workload, gpus=2)
    path = tmp_path / "plan.yaml"
    path.write_text(dump_plan(plan))
    assert load_plan(path).prediction == plan.prediction
    assert {e.name for e in events.events(step_of(plan)) if e.stream == "compute"} == {
        "model unpack",
        "model forward",
        "model backward",
        "model pack",
        "optimizer",
    }


def test_a_plan_without_units_is_told_so(found: Plan) -> None:
    silent = replace(found, prediction=replace(found.prediction, units=()))
    with pytest.raises(UsageError, match="does not say how long the layer"):
        step_of(silent)
