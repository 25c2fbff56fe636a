"""A plan as tables of plain values, in bytes and seconds: for spreadsheets, pandas and scripts."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from autoplan.errors import UsageError
from autoplan.plan import Plan

if TYPE_CHECKING:
    import pandas as pd

Table = Literal["candidates", "layers", "ranks"]
TABLES: tuple[Table, ...] = ("candidates", "layers", "ranks")

Row = dict[str, Any]


def rows(plan: Plan, table: Table = "candidates") -> list[Row]:
    """One of the tables of a plan: what was looked at (with the baselines), the layers, or the pipeline ranks.

    Raises `UsageError` when there is no table of that name.
    """
    if table == "candidates":
        return _candidates(plan)
    if table == "layers":
        return _layers(plan)
    if table == "ranks":
        return _ranks(plan)
    raise UsageError(f"a plan has no table '{table}'.", f"There are {', '.join(TABLES)}.")


def _candidates(plan: Plan) -> list[Row]:
    looked_at = [
        {
            "kind": "candidate",
            "name": "",
            **asdict(each.mesh),
            "micro_batch": each.micro_batch,
            "schedule": each.schedule,
            "status": each.status,
            "step_time_seconds": each.step_time,
            "is_bound": each.bound,
            "memory_bytes": each.memory,
            "reason": each.reason,
        }
        for each in plan.candidates
    ]
    by_hand = [
        {
            "kind": "baseline",
            "name": each.name,
            **asdict(each.mesh),
            "micro_batch": each.micro_batch,
            "schedule": "",
            "status": "cannot run" if each.step_time is None else "slower",
            "step_time_seconds": each.step_time,
            "is_bound": False,
            "memory_bytes": each.memory,
            "reason": each.note,
        }
        for each in plan.baselines
    ]
    return looked_at + by_hand


def _layers(plan: Plan) -> list[Row]:
    rank = {name: k % plan.mesh.pp for k, names in enumerate(plan.stages) for name in names}
    return [
        {
            "layer": layer,
            "rank": rank[layer],
            "strategy": run.strategy,
            "recompute": plan.by_name[run.strategy].recompute,
            "zero": plan.by_name[run.strategy].zero,
        }
        for run in plan.runs
        for layer in run.layers
    ]


def _ranks(plan: Plan) -> list[Row]:
    said = plan.prediction
    if not said.stages:
        sizes = {f"{name}_bytes": size for name, size in said.memory.items()}
        return [{"rank": 0, "layers": sum(len(run.layers) for run in plan.runs), "memory_bytes": said.memory.total, **sizes}]
    return [
        {
            "rank": s,
            "layers": sum(map(len, plan.stages[s :: plan.mesh.pp])),
            "forward_seconds": sum(stage.forward),
            "backward_seconds": sum(stage.backward),
            "weights_seconds": sum(stage.weights),
            "memory_bytes": stage.memory.total,
            **{f"{name}_bytes": size for name, size in stage.memory.items()},
        }
        for s, stage in enumerate(said.stages)
    ]


def csv_text(plan: Plan, table: Table = "candidates") -> str:
    """A table as CSV with a header. Text that a spreadsheet would take for a formula is quoted with an apostrophe."""
    found = rows(plan, table)
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(found[0]) if found else ["kind"], lineterminator="\n")
    writer.writeheader()
    for row in found:
        writer.writerow({key: _harmless(value) for key, value in row.items()})
    return out.getvalue()


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def frame(plan: Plan, table: Table = "candidates") -> pd.DataFrame:
    """A table as a pandas DataFrame. Raises `UsageError` when pandas is not installed."""
    found = rows(plan, table)
    try:
        import pandas as pd
    except ImportError:
        raise UsageError("a DataFrame needs pandas, which is not installed.", "Run: pip install pandas") from None
    return pd.DataFrame(found)
