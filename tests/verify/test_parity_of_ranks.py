"""`verify --ranks`: a plan on real processes equals the single process, and what does not is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autoplan.cli import main
from autoplan.verify.parity import _compare
from tests.test_parity import EXAMPLES


@pytest.mark.gloo
def test_a_plan_trains_as_one_process_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"{EXAMPLES}/gpt.py?size=124M&layers=2&hidden=32&heads=4&vocab=64&seq_len=16"
    file = tmp_path / "plan.yaml"
    asked = ["--gpus", "2", "--tp", "2", "--global-batch", "4", "--hardware", "cpu-gloo", "-o", str(file)]
    assert main(["plan", model, *asked, "--report", str(tmp_path / "report.html")]) == 0
    capsys.readouterr()
    assert main(["verify", str(file), "--ranks", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["parity"]
    assert found["gradients"] < 1e-10
    assert found["parameters"] < 1e-10
    assert main(["verify", str(file), "--ranks", "4"]) == 2
    assert "the plan is for 2 devices, not 4." in capsys.readouterr().err


def test_what_differs_is_named() -> None:
    one = [1.0], {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2)}
    many = [1.0], {"a": torch.ones(2), "b": torch.full((2,), 1.5)}, {"a": torch.ones(2)}
    found = _compare(2, one, many)
    assert not found.agrees
    assert (found.loss, found.gradients, found.parameters, found.worst) == (0.0, 0.5, 0.0, "b")
