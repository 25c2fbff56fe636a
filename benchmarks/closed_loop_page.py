"""docs/closed-loop.md: what was measured beside what was predicted, with a scatter for each case. Pure functions of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoplan.report.curves import Series, loglog
from autoplan.units import SECOND, show

SHOWN = 12
"""Plans of each case that the page lists."""
NEAR = 1.3
"""Plans of at most so many times the fastest's time run in the final rounds too: plans of equal work differ by less."""
HEAD = """# The closed loop: measured, planned, run, compared

Made by `python -m benchmarks.closed_loop` on one machine ({device}; ranks are processes of one thread that talk through gloo).
For each number of ranks the machine was profiled by `autoplan profile`, with as many ranks computing at once as the plans use.
For each model `autoplan plan` picked a plan with that profile. Then every uniform plan of the space was run for real: all meshes,
micro-batches, schedules, with and without sequence parallelism, all ZeRO levels, all layers recomputed or none; each one to four
steps after one to warm up, in rounds over all plans, then in rounds over the picked plan and those within {near:.0%} of the
fastest, lest luck be called fast. A plan's time is the median of its rounds. Where nothing is sharded, plans were run at ZeRO-3;
the picked ones are at ZeRO-1 or 2 today, and copy their parameters once a step, not twice.

- **Picked**: how much slower the plan that `autoplan plan` picked is than the fastest that was run.
- **Spearman**: rank correlation of predicted and measured times, over all plans.
- **MAPE**: mean absolute error of the predicted times. *After* is with the profile that `autoplan calibrate` made of every fourth
  plan, on the other plans, which it had not seen.
- **Noise**: how far apart (root mean square) the measured times of gpipe and 1f1b with one micro-batch are: the same work.

| model | ranks | plans | fastest | picked | Spearman | MAPE before | MAPE after | Spearman after | noise |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|
"""
_STYLE = """<style>
.curves { background: #fff; font: 12px system-ui, sans-serif; } text { fill: #5f6873; }
.grid { stroke: #e2e4e7; } .axis { stroke: #5f6873; } polyline { fill: none; stroke: #a4abb3; stroke-dasharray: 4 3; }
.s0 circle { fill: #2b5c8c; fill-opacity: .65; } .s1 circle { fill: #b0442f; } .s2 circle { fill: #cf8a2d; fill-opacity: .5; }
</style>"""


@dataclass(frozen=True)
class Row:
    """A plan that was run. Seconds of a step."""

    plan: str
    picked: bool
    taught: bool
    """It was among those that calibrated."""
    predicted: float
    calibrated: float
    measured: float
    rounds: int = 1
    """That it was run in."""


@dataclass(frozen=True)
class Case:
    """A model on a number of ranks."""

    name: str
    ranks: int
    rows: tuple[Row, ...]
    factors: Mapping[str, float]
    """What calibration corrected."""
    failed: Mapping[str, str]
    device: str
    model: str
    load: tuple[float, ...] = ()
    """The machine's load average whenever it began or went on."""
    rounds: int = 1
    """That every plan was run in."""
    noise: float = float("nan")
    """Root mean square of the relative differences between plans that are the same work."""

    @property
    def picked(self) -> Row | None:
        """The plan that was picked; None when it did not run."""
        return next((row for row in self.rows if row.picked), None)

    @property
    def fastest(self) -> Row:
        return min(self.rows, key=lambda row: row.measured)

    @property
    def behind(self) -> float:
        """How much slower the picked plan is than the fastest, as a share of the fastest."""
        return self.picked.measured / self.fastest.measured - 1 if self.picked else float("nan")

    @property
    def before(self) -> float:
        return mape([row.predicted for row in self.rows], [row.measured for row in self.rows])

    @property
    def after(self) -> float:
        held_out = [row for row in self.rows if not row.taught]
        return mape([row.calibrated for row in held_out], [row.measured for row in held_out])


def spearman(one: Sequence[float], two: Sequence[float]) -> float:
    """Rank correlation; equal values share their ranks."""
    a, b = _ranks(one), _ranks(two)
    if len(one) < 2 or not a.std() or not b.std():
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    array = np.array(values, dtype=np.float64)
    return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array], dtype=np.float64)


def mape(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Mean absolute relative error."""
    return sum(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)) / max(len(measured), 1)


def write(cases: Sequence[Case], folder: Path) -> None:
    """The page and its pictures."""
    (folder / "closed-loop.md").write_text(page(cases), encoding="utf-8")
    for case in cases:
        (folder / picture_name(case)).write_text(picture(case), encoding="utf-8")


def page(cases: Sequence[Case]) -> str:
    """The whole page."""
    lines = []
    for case in cases:
        measured = [row.measured for row in case.rows]
        numbers = [
            f"{len(case.rows)}",
            show(case.fastest.measured, SECOND),
            f"+{case.behind:.1%}" if case.picked else "did not run",
            f"{spearman([row.predicted for row in case.rows], measured):.3f}",
            f"{case.before:.1%}",
            f"{case.after:.1%}",
            f"{spearman([row.calibrated for row in case.rows], measured):.3f}",
            f"{case.noise:.0%}",
        ]
        lines.append(f"| {case.name} | {case.ranks} | {' | '.join(numbers)} |")
    return HEAD.format(device=cases[0].device, near=NEAR - 1) + "\n".join(lines) + "\n" + "".join(map(_section, cases))


def _section(case: Case) -> str:
    factors = ", ".join(f"{term} {factor:.3g}" for term, factor in case.factors.items())
    load = ", ".join(map(str, case.load)) or "not noted"
    rows = sorted(case.rows, key=lambda row: row.measured)
    listed = [row for i, row in enumerate(rows) if i < SHOWN or row.picked]
    lines = [
        f"| {i + 1} | {row.plan}{' **(picked)**' if row.picked else ''} | {row.rounds} | {show(row.measured, SECOND)} | "
        f"{show(row.predicted, SECOND)} | "
        f"{row.predicted / row.measured - 1:+.1%} | {row.calibrated / row.measured - 1:+.1%} |"
        for i, row in enumerate(rows)
        if row in listed
    ]
    failed = "".join(f"- did not run: {plan}: {error}\n" for plan, error in case.failed.items())
    return f"""
## {case.name} on {case.ranks} ranks

`{case.model}`. Rounds over all plans: {case.rounds}. Load average of the machine whenever it began or went on: {load}.
Calibration found these terms so many times as long as the profile said: {factors}.

![predicted against measured]({picture_name(case)})

Blue: every plan as predicted; orange: after calibration; red: the plan that was picked; the line is where both are equal.

| place | plan | rounds | measured | predicted | error | after calibration |
|--:|---|--:|--:|--:|--:|--:|
{chr(10).join(lines)}
{failed}"""


def picture_name(case: Case) -> str:
    return f"closed-loop-{case.name}-{case.ranks}.svg"


def picture(case: Case) -> str:
    """Predicted against measured, on logarithmic axes."""
    times = [value for row in case.rows for value in (row.predicted, row.calibrated, row.measured)]
    ends = (min(times), min(times)), (max(times), max(times))
    said = Series("predicted", tuple((row.measured, row.predicted, row.plan) for row in case.rows if not row.picked), ends)
    picked = Series("picked", tuple((row.measured, row.predicted, row.plan) for row in case.rows if row.picked))
    now = Series("calibrated", tuple((row.measured, row.calibrated, row.plan) for row in case.rows))
    label = f"{case.name} on {case.ranks} ranks: predicted against measured"
    drawn = loglog((said, picked, now), label, ("measured", SECOND), ("predicted", SECOND))
    inside = drawn.index(">") + 1
    return drawn[:inside].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + _STYLE + drawn[inside:] + "\n"
