"""`autoplan apply --dry-run` shows what `apply` makes of the model, and nothing that it doesn't."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest

from autoplan.api import load_plan
from autoplan.cli import main
from autoplan.graph import DTYPE_BYTES
from tests.test_parity import EXAMPLES

MODEL = f"{EXAMPLES}/gpt.py?size=124M&layers=4&hidden=32&heads=4&vocab=64&seq_len=16"


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    file = folder / "plan.yaml"
    asked = ["--gpus", "8", "--pp", "2", "--dp-shard", "2", "--tp", "2", "--global-batch", "16", "--hardware", "cpu-gloo"]
    assert main(["plan", MODEL, *asked, "-o", str(file), "--report", str(folder / "report.html")]) == 0
    return file


def test_what_is_shown_is_the_whole_model_in_parts(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = load_plan(plan_file)
    assert main(["apply", str(plan_file), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    shown = Counter(unit["name"] for rank in found["ranks"] for unit in rank["units"] if unit["name"])
    assert shown == Counter(name for name, _ in plan.layers())
    strategies = plan.by_name
    for rank in found["ranks"]:
        assert {unit["stage"] % 2 for unit in rank["units"]} == {rank["rank"]}
        for unit in rank["units"]:
            assert unit["reshard_after_forward"] == (strategies[unit["strategy"]].zero == 3)
            for held in unit["parameters"]:
                parts = 2 * (2 if held["layout"].startswith("Shard") else 1)
                assert prod(held["local_shape"]) * parts == prod(held["shape"]), held["name"]
                assert rank["rank"] in held["copies"]
                assert (len(held["copies"]) == 2) == (held["name"] == "wte.weight")
    (crossing,) = found["crossings"]
    assert (crossing["source"], crossing["last"], crossing["gradient"]) == (0, 1, True)
    assert crossing["bytes"] == prod(crossing["shape"]) * DTYPE_BYTES[plan.workload.compute_dtype]


def test_it_is_readable_in_eighty_columns(
    plan_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["apply", str(plan_file), MODEL, "--dry-run"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines)
    titles = [line.partition(":")[0] for before, line in pairwise(lines) if not before]
    assert titles == [
        "Wrapped", "Sharded", "Sharded", "Sharded", "Split", "Crosses, of each micro-batch", "Recomputed in the backward pass",
    ]  # fmt: skip


def test_training_is_for_a_program(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", str(plan_file)]) == 2
    assert "--dry-run" in capsys.readouterr().err
