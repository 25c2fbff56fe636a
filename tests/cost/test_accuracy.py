"""The exam itself: what is refused and why, the split, the figures."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.accuracy import Scored, figures
from benchmarks.pricing import Pricer, frameworks
from benchmarks.runs import Refused, Run, read, run_of

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "published"
ROWS = {row["id"]: row for name in ("megatron", "torchtitan", "vtrain", "simumax") for row in read(PUBLISHED / f"{name}.csv")}


def a_run(**changes: object) -> Run:
    return replace(run_of(ROWS["narayanan-t1-39B"]), **changes)  # type: ignore[arg-type]


def test_a_row_becomes_a_run() -> None:
    run = a_run()
    assert (run.layers, run.tp, run.pp, run.dp, run.micro_batch, run.recompute) == (48, 8, 2, 32, 4, "full")
    assert run.shape.unfused
    assert run.dtype == "float16"
    assert run.seconds == pytest.approx(14.4535)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("titan-t2-8b-cp2", "context"),
        ("titan-t4-70b-2d", "fp8"),
        ("megatron-h100-16B", "micro_batch is not told"),
        ("narayanan-t2-174.6B-z3-384", "another framework"),
        ("titan-a100-l2-70b-selective_layer-lb2-OOM", "no measurement"),
    ],
)
def test_what_is_not_modelled_is_refused_with_its_reason(name: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        run_of(ROWS[name])


def test_a_group_is_never_cut_in_two() -> None:
    halves: dict[str, set[bool]] = {}
    for row in ROWS.values():
        try:
            run = run_of(row)
        except Refused:
            continue
        halves.setdefault(f"{run.model}/{run.gpus}/{run.tp}/{run.pp}", set()).add(run.held_out)
    assert all(len(half) == 1 for half in halves.values())
    assert {half for some in halves.values() for half in some} == {False, True}


def test_every_source_of_rows_has_its_constants_or_is_neutral() -> None:
    software = frameworks()
    assert {"vtrain", "nanotron", "nanotron-slow", "llm-foundry", "simumax"} <= software.keys()
    assert all(entry.compute > 0.5 for entry in software.values())


def test_figures_of_a_perfect_and_of_an_inverted_prediction() -> None:
    runs = [a_run(seconds=float(t)) for t in range(1, 7)]
    perfect = figures([Scored(run, run.seconds, None) for run in runs])
    assert perfect["mape"] == perfect["regret"] == 0
    assert perfect["spearman"] == perfect["order"] == 1
    inverted = figures([Scored(run, 7 - run.seconds, None) for run in runs])
    assert inverted["spearman"] == -1
    assert inverted["order"] == 0
    assert inverted["regret"] == 5


def test_memory_and_noise() -> None:
    run = a_run(memory=100.0)
    found = figures([Scored(run, run.seconds, 90.0), Scored(replace(run, seconds=run.seconds * 1.1), run.seconds, 110.0)])
    assert found["memory"] == pytest.approx(0.1)
    assert found["memory_under"] == 0.5
    assert found["noise"] == pytest.approx(0.1 / 1.05)
    assert figures([]) == {}


def test_a_single_layer_takes_its_passes_and_no_optimizer() -> None:
    run = run_of(ROWS["korthikanti-t4-22B-layer-sp"])
    pricer = Pricer(frameworks())
    assert run.single_layer
    assert pricer.seconds(run) == pytest.approx(run.seconds, rel=0.1)
    assert pricer.seconds(run) < pricer.price(run).step_time
