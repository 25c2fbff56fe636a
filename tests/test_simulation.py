"""The page of what the price and the event simulation say is of today's plans and today's cost model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.simulation import apart, rows, table

PAGE = Path(__file__).parent.parent / "docs" / "simulation.md"


@pytest.mark.parametrize("report", ["transformer-4", "llama-8b-8"])
def test_the_page_says_what_is_simulated_today(report: str) -> None:
    found = list(rows(report))
    said = PAGE.read_text(encoding="utf-8")
    missing = [line for line in table(found).splitlines() if line not in said]
    assert not missing, "run `python -m benchmarks.simulation -o docs/simulation.md`"
    assert all(abs(apart(row.plan)) < 0.02 for row in found)
