"""Measuring: what a machine with known curves is found to be; time, noise, nonsense and interruption."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path

import pytest

from autoplan.errors import UsageError
from autoplan.files.hardware import dump_hardware, load_hardware
from autoplan.files.measurements import SideFile
from autoplan.measurement import COLLECTIVES, Operation
from autoplan.profile.fitted import fitted, predicted, residuals
from autoplan.profile.session import FEWEST, measured
from autoplan.profile.suite import MOVERS, suite
from tests.profile.simulated import KIB, MIB, SimulatedBench, truth

DTYPES = ("bfloat16", "float32")
BETWEEN = [
    *(Operation("matmul", 10.0**e, "bfloat16") for e in (9.5, 10, 10.7, 11.3, 12)),
    *(Operation("attention", 10.0**e, "bfloat16") for e in (9.5, 10, 10.5, 11)),
    *(Operation("add", e * MIB, "bfloat16") for e in (30.0, 100.0, 500.0, 900.0)),
]
SENT = [
    Operation(kind, size, "float32", (), "", group, stride)
    for kind in COLLECTIVES
    for size in (16 * KIB, 100 * KIB, MIB, 20 * MIB, 700 * MIB)
    for group, stride in ((2, 1), (4, 1), (3, 4))
]


@pytest.mark.parametrize("hosts", [1, 3])
def test_a_machine_with_known_curves_is_recovered(hosts: int, tmp_path: Path) -> None:
    bench = SimulatedBench(hosts)
    found = fitted(measured(bench, suite(bench.machine, DTYPES), 60.0), bench.machine, "found", "2026-01-31")
    true = truth(hosts)
    asked = BETWEEN + [op for op in SENT if op.stride == 1 or hosts > 1]
    errors = {op: predicted(op, found) / predicted(op, true) - 1 for op in asked}  # type: ignore[operator]
    assert max(map(abs, errors.values())) < 0.03, max(errors.items(), key=lambda item: abs(item[1]))
    assert found.device.launch == pytest.approx(true.device.launch, rel=0.03)
    assert found.device.dispatch == pytest.approx(true.device.dispatch, rel=0.03)
    assert found.jitter == pytest.approx(true.jitter, rel=0.03)
    assert found.overlap == pytest.approx(true.overlap, abs=0.03)
    assert dict(found.links[0].slowdown) == pytest.approx(dict(true.links[0].slowdown), rel=0.03)
    assert [link.span for link in found.links] == [link.span for link in true.links]
    (tmp_path / "found.yaml").write_text(dump_hardware(found))
    assert load_hardware(tmp_path / "found.yaml") == found


def test_residuals_tell_what_a_curve_cannot_say() -> None:
    bench = SimulatedBench(noise=0.001)
    run = measured(bench, suite(bench.machine, DTYPES), 60.0)
    rows = residuals(fitted(run, bench.machine, "found", "2026-01-31"), run)
    assert {row.measurement.operation.kind for row in rows} >= {"matmul", "attention", "add", "optimizer", "all_reduce"}
    assert max(abs(row.error) for row in rows if row.measurement.operation.kind in MOVERS) < 0.01


@pytest.mark.parametrize("wrong", [nan, -1.0, 0.0, inf])
def test_a_time_that_is_none_is_refused(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = SimulatedBench()
    monkeypatch.setattr(bench, "exact", lambda op: wrong if op.kind == "softmax" else 1e-3)
    monkeypatch.setattr(bench, "times", lambda op, _: [bench.exact(op)] * 5)
    with pytest.raises(UsageError, match=r"timing of 'softmax .*' gave .* which is no time"):
        measured(bench, suite(bench.machine, DTYPES), 60.0)


def test_a_busy_machine_is_refused_and_a_noisy_operation_is_timed_again() -> None:
    bench = SimulatedBench(noise=0.0)
    todo = suite(bench.machine, DTYPES)
    bench.times = lambda op, _: [1e-3, 1.1e-3, 4e-3, 9e-3, 1e-3, 9e-3]  # type: ignore[assignment,method-assign]
    with pytest.raises(UsageError, match="too busy to be measured: 'launch"):
        measured(bench, todo, 60.0)
    busy_first = iter([[1.0, 2.0, 3.0, 4.0, 5.0], [3.0] * 20])
    bench.times = lambda op, _: next(busy_first)  # type: ignore[assignment,method-assign]
    assert measured(bench, todo[:1], 60.0)[0].spread == 0


def test_the_budget_bounds_the_time_and_large_sizes_are_left_out() -> None:
    bench = SimulatedBench()
    todo = suite(bench.machine, DTYPES)
    found = measured(bench, todo, 0.4)
    assert len(found) < len(todo)
    assert bench.now < 2.0
    assert {m.operation.kind for m in found} == {op.kind for op in todo}
    assert fitted(found, bench.machine, "short", "2026-01-31").links
    generous = SimulatedBench()
    assert len(measured(generous, todo, 60.0)) == len(todo)
    assert generous.now < 75


def test_an_interrupted_session_goes_on(tmp_path: Path) -> None:
    output, facts = tmp_path / "my.yaml", {"device": "simulated"}
    side, bench = SideFile(output, facts), SimulatedBench()
    todo = suite(bench.machine, DTYPES)[:20]
    side.start([])

    def stop(step: object) -> None:
        if len(bench.asked) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(bench, todo, 20.0, keep=side.add, tell=stop)
    with side.path.open("a") as file:
        file.write('{"operation": {"kind"')  # killed in the middle of a line
    again = SideFile(output, facts)
    assert len(again.read()) == 12
    second = SimulatedBench()
    done = measured(second, todo, 20.0, again.read(), again.add)
    assert second.asked == todo[12:]
    assert [m.operation for m in done] == todo
    assert done[0].runs >= FEWEST
    assert SideFile(output, {"device": "another"}).read() == []
