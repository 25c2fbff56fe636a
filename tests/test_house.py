"""The house: floors, doors, file sizes, and a face that loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

HEAVY = ("torch", "pulp", "highspy", "pandas", "transformers", "yaml", "jinja2")


@pytest.mark.parametrize(
    "statement",
    ["import autoplan", "import autoplan.graph, autoplan.plan, autoplan.strategy, autoplan.hardware"],
)
def test_importing_the_package_loads_nothing_heavy(statement: str) -> None:
    loaded = run(f"{statement}; import sys; print(' '.join(sys.modules))").split()
    assert not set(loaded) & set(HEAVY)


def test_help_loads_neither_torch_nor_the_solver() -> None:
    code = "import sys; sys.argv = ['autoplan', '--help']\nfrom autoplan.cli import main\nmain()"
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert finished.returncode == 0
    assert "plan" in finished.stdout
    modules = {line.split("|")[-1].strip() for line in finished.stderr.splitlines() if line.startswith("import time:")}
    assert not modules & {"torch", "pulp", "highspy"}


@pytest.mark.parametrize(
    "room", ["autoplan.cost.model", "autoplan.files.plan", "autoplan.search.planner", "autoplan.report.page"]
)
def test_the_planner_runs_without_torch(room: str) -> None:
    assert run(f"import sys, {room}; print('torch' in sys.modules)").strip() == "False"


def test_the_face_keeps_its_verbs_when_rooms_of_the_same_name_are_imported() -> None:
    verbs = "callable(autoplan.plan), callable(autoplan.apply), callable(autoplan.report)"
    assert run(f"import autoplan, autoplan.plan, autoplan.report.page, autoplan.apply; print({verbs})").split() == ["True"] * 3


def test_no_file_outgrows_its_reader() -> None:
    long = {
        str(p.relative_to(ROOT)): n for p in (ROOT / "autoplan").rglob("*.py") if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
