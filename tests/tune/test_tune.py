"""`autoplan tune` on two real processes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from autoplan import api
from autoplan.cli import main
from autoplan.files.workload import workload
from autoplan.tune.tuner import candidates
from tests.bodies import model
from tests.hardware import machine

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = f"{EXAMPLES}/gpt.py?layers=2&hidden=32&heads=4&vocab=64&seq_len=16"


def test_candidates_are_the_best_of_each_mesh() -> None:
    graph, load = model(layers=4, hidden=256, ffn=512, seq=64), workload({}, {"global_batch": 16}, 4)
    found = list(candidates(graph, machine(), load, 4, 4))
    assert len(found) == 4
    assert len({plan.mesh for plan in found}) == 4
    times = [plan.prediction.step_time for plan in found]
    assert times[0] == min(times)
    assert found[0] == api.plan(graph, gpus=4, hardware=machine(), global_batch=16)
    for plan in found:
        again = api.plan(graph, gpus=4, hardware=machine(), global_batch=16, fixed={"pp": plan.mesh.pp, "tp": plan.mesh.tp})
        assert again.prediction.step_time <= plan.prediction.step_time * (1 + 1e-4)


@pytest.mark.gloo
def test_the_fastest_that_ran_is_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "plan.yaml"
    asked = ["tune", TINY, "--top", "2", "--steps", "4", "--ranks", "2", "--hardware", "cpu-gloo", "-o", str(output), "--json"]
    assert main([*asked, "--global-batch", "8"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert len(rows) == 2
    assert all(len(row["seconds"]) == 4 for row in rows)
    assert rows[0]["measured"] <= rows[1]["measured"]
    assert sorted(row["predicted_place"] for row in rows) == [1, 2]
    plan = api.load_plan(output)
    assert plan.mesh.size == 2
    assert rows[0]["mesh"] == asdict(plan.mesh)
    assert "the fastest of 2 plans that were run" in plan.warnings[-1]
    assert main(asked) == 2
    assert "exists" in capfd.readouterr().err
