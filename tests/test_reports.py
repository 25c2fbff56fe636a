"""The committed sample reports are what the committed code makes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from autoplan.api import load_plan, report, verify
from autoplan.report import sure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "reports"))

import make  # noqa: E402

AGAIN = "the reports are not those of this code: run `make reports` and look at what changed"


@pytest.mark.parametrize("name", ["transformer-4", "llama-8b-8"])
def test_a_sample_plan_is_made_again_byte_for_byte(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    printed = make.make(make.CASES[name], tmp_path / "plan.yaml", tmp_path / "page.html")
    assert (tmp_path / "plan.yaml").read_bytes() == (ROOT / "reports" / f"{name}.yaml").read_bytes(), AGAIN
    if name == "llama-8b-8":
        readme = make.README.read_text(encoding="utf-8")
        start, end = make.shown(readme, "autoplan plan examples/llama.py --gpus 8", "text")
        assert make.excerpt(printed) == readme[start:end], AGAIN


def test_the_errors_that_pages_show_are_those_of_the_accuracy_table() -> None:
    accuracy = make.ACCURACY.read_text(encoding="utf-8")
    assert sure.ERRORS.read_text(encoding="utf-8") == make.errors(accuracy), AGAIN


@pytest.mark.parametrize("name", make.CASES)
def test_a_sample_page_is_that_of_its_plan(name: str) -> None:
    shown = report(load_plan(ROOT / "reports" / f"{name}.yaml"))
    assert shown == (ROOT / "reports" / f"{name}.html").read_text(encoding="utf-8"), AGAIN


@pytest.mark.parametrize("name", make.CASES)
def test_a_sample_plan_does_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its real size: what its ranks send, and their peaks within 3 %."""
    monkeypatch.chdir(ROOT)
    plan = load_plan(ROOT / "reports" / f"{name}.yaml")
    found = verify(plan)
    assert found.agrees, found.differences
    assert all(each.over <= 0.03 for each in found.memory)
