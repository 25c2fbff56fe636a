"""Calibration: what a machine that differs from its profile in known terms is found to be."""

from __future__ import annotations

import json
from math import log
from pathlib import Path

import pytest

from autoplan import api
from autoplan.calibrate.calibration import Run, calibrated
from autoplan.calibrate.terms import TERMS, corrected, scaled
from autoplan.cli import main
from autoplan.cost.model import CostModel
from autoplan.errors import UsageError
from autoplan.files.hardware import dump_hardware, load_hardware
from autoplan.files.measurements import dump_steps, load_steps
from autoplan.hardware import HardwareProfile
from autoplan.measurement import MeasuredSteps, Phases
from autoplan.plan import Plan
from tests.bodies import model
from tests.hardware import machine, uneven

GRAPH = model(layers=4, hidden=1024, ffn=4096, seq=512, vocab=8192)
WISHES: tuple[dict[str, int], ...] = ({"tp": 4}, {"dp_shard": 4}, {"dp_replicate": 4}, {"pp": 4}, {"dp_shard": 2, "tp": 2})


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return [api.plan(GRAPH, gpus=4, hardware=machine(), global_batch=16, fixed=wish) for wish in WISHES]


def steps(plan: Plan, real: HardwareProfile, *, phases: bool = False, peak: float | None = None) -> MeasuredSteps:
    """What a machine like `real` would measure."""
    found = CostModel(GRAPH, real, plan.workload).predict_plan(plan)
    time = found.time
    split = Phases(
        forward=time.forward,
        backward=time.backward + time.recompute,
        communication=time.tp_communication + time.dp_communication + time.pp_communication,
        optimizer=time.optimizer,
    )
    step = found.step_time if found.scheduled is None else found.scheduled
    return MeasuredSteps(
        seconds=(step * 0.99, step, step * 1.5), ranks=4, device="gpu", peak_memory=peak, phases=split if phases else Phases()
    )


@pytest.mark.parametrize("factors", [{"links": 2.5}, {"products": 1.7}, {"products": 0.5, "memory": 1.3, "links": 3.0}])
def test_the_terms_that_were_wrong_are_found(plans: list[Plan], factors: dict[str, float]) -> None:
    real = scaled(machine(), factors)
    found = calibrated(machine(), [Run(GRAPH, plan, steps(plan, real, phases=True)) for plan in plans], "2026-01-31")
    for term in ("products", "memory", "links"):
        assert found.factors[term] == pytest.approx(factors.get(term, 1.0), rel=0.03)
    assert found.wrong == max(factors, key=lambda term: abs(log(factors[term])))
    assert all(abs(line.left) < 0.01 for line in found.times if line.what == "step")
    unseen = api.plan(GRAPH, gpus=4, hardware=machine(), global_batch=16, fixed={"dp_replicate": 2, "tp": 2})
    said = CostModel(GRAPH, found.profile, unseen.workload).predict_plan(unseen).step_time
    assert said == pytest.approx(CostModel(GRAPH, real, unseen.workload).predict_plan(unseen).step_time, rel=0.02)


def test_phases_tell_apart_what_one_step_cannot(plans: list[Plan]) -> None:
    plan, real = plans[0], scaled(machine(), {"links": 2.0})
    vague = calibrated(machine(), [Run(GRAPH, plan, steps(plan, real))], "2026-01-31")
    clear = calibrated(machine(), [Run(GRAPH, plan, steps(plan, real, phases=True))], "2026-01-31")
    assert vague.times[0].left == pytest.approx(0, abs=0.01)
    assert vague.factors["products"] > 1.01
    assert clear.factors["links"] == pytest.approx(2.0, rel=0.05)
    assert clear.factors["products"] == pytest.approx(1.0, abs=0.03)


def test_a_right_profile_stays_as_it_is(plans: list[Plan]) -> None:
    found = calibrated(machine(), [Run(GRAPH, plan, steps(plan, machine())) for plan in plans], "2026-01-31")
    assert found.factors == pytest.approx(dict.fromkeys(TERMS, 1.0))
    assert found.profile.device.reserved == machine().device.reserved


def test_memory_that_was_predicted_too_small_is_reserved(plans: list[Plan]) -> None:
    plan = plans[1]
    size = plan.prediction.memory.allocated
    found = calibrated(machine(), [Run(GRAPH, plan, steps(plan, machine(), peak=size + 3e9))], "2026-01-31")
    assert found.extra_reserved == pytest.approx(3e9)
    assert found.profile.device.reserved == pytest.approx(machine().device.reserved + 3e9)
    assert calibrated(machine(), [Run(GRAPH, plan, steps(plan, machine(), peak=size / 2))], "2026-01-31").extra_reserved == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = str(Path(__file__).parents[2] / "examples" / "gpt.py?layers=2&hidden=64&heads=4&vocab=256&seq_len=64")
    profile = load_hardware(Path(__file__).parents[2] / "hwprofiles" / "cpu-gloo.yaml")
    plan = api.plan(example, gpus=2, hardware=profile, global_batch=8, compute_dtype="float32")
    api.save_plan(plan, tmp_path / "plan.yaml")
    step = plan.prediction.scheduled or plan.prediction.step_time
    found = MeasuredSteps(seconds=(3 * step,), ranks=2, device="cpu", peak_memory=1e9)
    (tmp_path / "steps.json").write_text(dump_steps(found))
    assert load_steps(tmp_path / "steps.json") == found
    asked = ["calibrate", str(tmp_path / "plan.yaml"), "--measured", str(tmp_path / "steps.json")]
    assert main([*asked, "-o", str(tmp_path / "better.yaml")]) == 0
    assert "Furthest off" in capsys.readouterr().out
    better = load_hardware(tmp_path / "better.yaml")
    assert better.name == "better"
    assert "times as long" in better.device.source
    assert api.calibrate([plan], [found], hardware=better).times[0].error == pytest.approx(0, abs=0.02)
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lines"][0]["measured"] == 3 * step
    assert main([*asked, "-o", str(tmp_path / "better.yaml")]) == 2
    assert dump_hardware(load_hardware(tmp_path / "better.yaml")) == dump_hardware(better)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid"),
        ('{"seconds": [], "ranks": 4, "device": "gpu"}', "no step at all"),
        ('{"seconds": [1.0, -2.0], "ranks": 4, "device": "gpu"}', "none"),
        ('{"seconds": [NaN], "ranks": 4, "device": "gpu"}', "none"),
        ('{"seconds": [1.0], "device": "gpu"}', "'ranks' is missing"),
        ('{"seconds": [1.0], "ranks": 4, "device": "gpu", "phases": {"backwards": 1}}', "backwards"),
    ],
)
def test_steps_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "steps.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_steps(tmp_path / "steps.json")


def test_steps_of_another_number_of_ranks(plans: list[Plan]) -> None:
    wrong = MeasuredSteps(seconds=(1.0,), ranks=8, device="gpu")
    with pytest.raises(UsageError, match="measured on 8 ranks, the plan is for 4"):
        api.calibrate(plans[:1], [wrong], hardware=machine(), model=GRAPH)
    with pytest.raises(UsageError, match="5 plans and 1 measurements"):
        api.calibrate(plans, [wrong], hardware=machine(), model=GRAPH)


def test_one_disturbed_run_does_not_decide(plans: list[Plan]) -> None:
    real = scaled(machine(), {"links": 2.0})
    runs = [Run(GRAPH, plan, steps(plan, real, phases=True)) for plan in plans]
    slow = MeasuredSteps(seconds=(20 * runs[-1].steps.step_time,), ranks=4, device="gpu")
    found = calibrated(machine(), [*runs, Run(GRAPH, plans[-1], slow)], "2026-01-31")
    assert found.factors["links"] == pytest.approx(2.0, rel=0.15)
    assert found.factors["products"] == pytest.approx(1.0, rel=0.15)


def test_what_dtensors_and_waiting_cost_is_corrected_too(tmp_path: Path) -> None:
    profile = uneven(machine())
    found = corrected(profile, dict.fromkeys(TERMS, 2.0), 0.0, "2026-01-31", "3 runs")
    assert found.jitter == 2 * profile.jitter
    assert found.device.dispatch == 2 * profile.device.dispatch
    (tmp_path / "found.yaml").write_text(dump_hardware(found))
    again = load_hardware(tmp_path / "found.yaml")
    assert again == found
    for source, key in ((again.source, "jitter"), (again.device.source, "dispatch")):
        assert any(line.startswith(f"{key}: ") and "by 3 runs: 2 times as long" in line for line in source.splitlines())
