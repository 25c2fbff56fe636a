"""A plan as data: tables, a trace, a comparison, a notebook's card."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from autoplan.cost import events
from autoplan.cost.simulated import step_of
from autoplan.errors import UsageError
from autoplan.plan import Plan
from autoplan.report import layers, versus
from autoplan.report.notebook import card
from autoplan.report.page import comparison
from autoplan.report.rows import csv_text, frame, rows
from autoplan.report.tables import table
from autoplan.report.terminal import plain_text, summary
from autoplan.report.trace import trace_json
from autoplan.strategy import Mesh, Strategy
from autoplan.workload import Workload

from .plans import EVIL, hostile, llama, piped, single
from .test_report import Reader


def slices(plan: Plan) -> list[dict[str, Any]]:
    return [event for event in json.loads(trace_json(plan))["traceEvents"] if event["ph"] == "X"]


def test_the_candidates_as_csv_are_those_of_the_plan() -> None:
    plan = piped()
    read = list(csv.DictReader(io.StringIO(csv_text(plan))))
    assert len(read) == len(plan.candidates) + len(plan.baselines)
    assert (read[0]["pp"], read[0]["schedule"], float(read[0]["step_time_seconds"])) == ("4", "1f1b", 9.0)
    assert csv_text(single()) == "kind\n"


def test_a_table_holds_no_formula() -> None:
    plan = llama()
    evil = replace(plan, baselines=(replace(plan.baselines[0], name="=HYPERLINK(1)", note="+1"),))
    last = list(csv.DictReader(io.StringIO(csv_text(evil))))[-1]
    assert (last["name"], last["reason"]) == ("'=HYPERLINK(1)", "'+1")


def test_the_tables_of_layers_and_ranks() -> None:
    plan = piped("interleaved-1f1b", chunks=2)
    assert [row["rank"] for row in rows(plan, "layers")] == [k % 4 for k in range(8) for _ in range(4)]
    assert [row["layers"] for row in rows(plan, "ranks")] == [8] * 4
    assert rows(plan, "ranks")[0]["memory_bytes"] == plan.prediction.stages[0].memory.total
    assert len(rows(single(), "ranks")) == 1
    with pytest.raises(UsageError, match="no table 'x'"):
        rows(plan, "x")  # type: ignore[arg-type]


def test_a_data_frame() -> None:
    made = frame(piped())
    assert made.loc[made["status"] == "chosen", "pp"].tolist() == [4]
    assert made["step_time_seconds"].dtype == float


def test_without_pandas_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="needs pandas"):
        frame(piped())


def test_a_trace_is_the_event_simulation() -> None:
    plan = piped(batch=16)
    found = slices(plan)
    assert len([one for one in found if one["name"] == "layers.9 backward"]) == 16
    assert len([one for one in found if one["cat"].startswith("send")]) == 3 * 16 * 2
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for one in found:
        threads.setdefault((one["pid"], one["tid"]), []).append((one["ts"], one["ts"] + one["dur"]))
    assert len(threads) == 4 + 3 + 3, "every rank computes, and sends where there is a neighbour"
    for mine in threads.values():
        assert all(end <= start + 0.01 for (_, end), (start, _) in pairwise(sorted(mine)))
    last = max(one["ts"] + one["dur"] for one in found)
    assert last == pytest.approx(events.seconds(step_of(plan)) * 1e6)


def test_a_trace_parts_the_backward_pass_of_zero_bubble() -> None:
    found = slices(piped("zero-bubble", batch=16))
    assert len([one for one in found if one["name"] == "layers.9 backward inputs"]) == 16
    assert len([one for one in found if one["name"] == "layers.9 backward weights"]) == 16
    assert len([one for one in found if one["cat"].startswith("send")]) == 3 * 16 * 2


def test_a_trace_without_a_pipeline_has_the_streams_of_fsdp() -> None:
    plan = llama()
    found = json.loads(trace_json(plan))["traceEvents"]
    assert [one["args"]["name"] for one in found if one["name"] == "thread_name"] == ["compute", "gather", "reduce"]
    shown = [one for one in found if one["ph"] == "X"]
    assert max(one["ts"] + one["dur"] for one in shown) == pytest.approx(events.seconds(step_of(plan)) * 1e6)
    assert [one["name"] for one in shown if one["tid"] == 1][:2] == ["before layers.0 gather", "layers.0 gather"]
    assert json.loads(trace_json(hostile()))["traceEvents"]
    assert EVIL not in trace_json(hostile())


def test_a_plan_that_does_not_say_what_its_layers_take_has_no_trace() -> None:
    with pytest.raises(UsageError, match=r"does not say how long the layer .transformer\.h\.0. takes"):
        trace_json(replace(single(), prediction=replace(single().prediction, units=())))


def test_a_trace_that_no_viewer_opens_is_refused() -> None:
    with pytest.raises(UsageError, match="too many for a viewer"):
        trace_json(replace(piped(), workload=Workload(global_batch=10**6)))


def test_plans_side_by_side() -> None:
    plans = [("runs/a.yaml", llama()), ("runs/b.yaml", piped(batch=64))]
    assert versus.names(plans) == ("a.yaml", "b.yaml")
    assert versus.names([("x/a.yaml", llama()), ("y/a.yaml", llama())]) == ("x/a.yaml", "y/a.yaml")
    assert versus.verdict(plans).startswith("a.yaml is the fastest that fits: 1.14x the speed of b.yaml")
    assert versus.caution(plans) == ""
    assert "workloads differ" in versus.caution([*plans, ("c", piped(batch=32))])
    mesh = next(line for line in versus.choices(plans) if line.label == "Mesh")
    assert (mesh.differs, mesh.texts) == (True, ("dp_shard 4 x tp 2", "pp 4 x tp 2"))
    step = next(line for line in versus.costs(plans) if line.label == "Step time")
    assert step.best == 0
    assert versus.verdict([("a", hostile()), ("b", hostile())]).startswith("None of the plans fits")


def test_the_page_of_a_comparison() -> None:
    text = comparison([("a.yaml", llama()), ("b.yaml", piped()), (EVIL, hostile())])
    reader = Reader(text)
    assert "img" not in reader.tags
    assert reader.tags.count("script") == 1
    assert len(text.encode()) < 300_000
    assert "http" not in text.replace("http-equiv", "")
    assert "7.92 s" in reader.text


def test_a_notebook_shows_a_card() -> None:
    from autoplan import api

    assert api.Plan._repr_html_(llama()) == card(llama())  # type: ignore[attr-defined]
    assert "7.92 s" in card(llama())
    assert "pp 4: layers.0-7" in card(piped())
    assert "<img" not in card(hostile())


@pytest.mark.parametrize("plan", [llama(), piped(), single(), hostile()], ids=["llama", "piped", "single", "hostile"])
def test_forty_columns_are_enough(plan: Plan) -> None:
    out = io.StringIO()
    Console(file=out, width=40, no_color=True).print(summary(plan))
    wide = [line for line in out.getvalue().splitlines() if len(line) > 40 and "torchrun" not in line and "autoplan" not in line]
    assert [line for line in wide if "rdzv" not in line] == []


def test_text_for_a_file_has_no_colours_and_no_loose_ends() -> None:
    text = plain_text(piped())
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_long_name_breaks_where_it_has_parts() -> None:
    rows = table(("<", "layer"), ("<", "strategy"), ("<", "what"))
    rows.add_row(Text("transformer.encoder.layers.0-5"), Text("layers-tp8-recompute-zero1"), Text("x" * 30))
    out = io.StringIO()
    Console(file=out, width=60).print(rows)
    lines = [line.split() for line in out.getvalue().splitlines()[2:]]
    assert [line[0] for line in lines] == ["transformer.", "encoder.layers.", "0-5"], "a range holds together"
    assert [line[1] for line in lines[:2]] == ["layers-tp8-", "recompute-zero1"]
    assert lines[0][2] + lines[1][2] == "x" * 30, "a word without parts is folded"


def test_the_level_is_told_where_fsdp_acts() -> None:
    plan = single()
    alike = replace(plan.workload, param_dtype="float32", compute_dtype="float32", reduce_dtype="float32")
    over_tp = replace(plan, mesh=Mesh(tp=2), workload=alike)
    words = [layers.reshard_words(each, Strategy(zero=zero)) for each in (plan, over_tp) for zero in (3, 1)]
    assert words == ["ZeRO-3", "ZeRO-1", "-", "-"]
