"""How sure a prediction is: how far the cost model was off on the published training runs that are nearest to the plan.

The numbers are those of docs/accuracy.md, of runs that no constant was fitted on; `make reports` copies them into errors.csv.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from autoplan.plan import Plan
from autoplan.report import words

ERRORS = Path(__file__).parent / "errors.csv"


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """Runs of one source, and what their errors mean for the step of a plan."""

    runs: str
    number: int
    half: str
    """The error that half of the runs do not exceed."""
    most: str
    """Likewise 95 % of them."""
    step: str
    """The step of the plan, off by `half` to either side."""
    memory: str


def errors(plan: Plan) -> tuple[ErrorRow, ...]:
    """The sources whose devices and kind of model are the plan's, the one with most runs first; empty when there is none."""
    devices = set(re.split(r"[^a-z0-9]+", plan.hardware.lower()))
    kind = "experts" if plan.mesh.ep > 1 else "dense"
    found = [row for row in _table() if row["model"] == kind and devices & set(row["devices"].split())]
    return tuple(_row(row, plan.prediction.step_time) for row in sorted(found, key=lambda row: -int(row["number"])))


@cache
def _table() -> list[dict[str, str]]:
    with ERRORS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _row(row: dict[str, str], step: float) -> ErrorRow:
    half = float(row["half"]) / 100
    return ErrorRow(
        runs=row["runs"],
        number=int(row["number"]),
        half=words.percent(half),
        most=words.percent(float(row["most"]) / 100),
        step=f"{words.seconds(step / (1 + half))} to {words.seconds(step / (1 - half))}",
        memory=words.percent(float(row["memory"]) / 100) if row["memory"] else "-",
    )
