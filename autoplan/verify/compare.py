"""`verify`: the dry run beside the plan, and every difference between them in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autoplan.cost.model import CostModel
from autoplan.errors import UsageError
from autoplan.plan import MemoryBreakdown, Plan, Prediction
from autoplan.units import BYTE, Bytes, show
from autoplan.verify.expected import expected_traffic
from autoplan.verify.traffic import Amount, Traffic, total

SAME = 1e-6
"""Relative difference below which two predictions of one plan are equal: they are rounded in the plan's file."""


@dataclass(frozen=True)
class Row:
    """One kind of collective on one axis, on one pipeline rank."""

    rank: int
    axis: str
    kind: str
    expected: Amount
    seen: Amount

    @property
    def agrees(self) -> bool:
        return self.expected == self.seen


@dataclass(frozen=True)
class Memory:
    """Peak bytes that tensors hold on one pipeline rank."""

    rank: int
    predicted: Bytes
    measured: Bytes

    @property
    def agrees(self) -> bool:
        """A prediction may be too high, never too low."""
        return self.measured <= self.predicted

    @property
    def over(self) -> float:
        """How much more is predicted, as a fraction of what was measured."""
        return self.predicted / self.measured - 1 if self.measured else 0.0


@dataclass(frozen=True)
class DryRun:
    """What was found."""

    rows: tuple[Row, ...]
    memory: tuple[Memory, ...]
    differences: tuple[str, ...]
    """One sentence each; empty when all agree."""
    notes: tuple[str, ...] = ()
    """What was not checked, and why."""
    ran: str = ""
    """Of how many micro-batches steps were run, where that is not all of them."""

    @property
    def agrees(self) -> bool:
        return not self.differences


def compare(plan: Plan, costs: CostModel, seen: Mapping[int, tuple[Traffic, Bytes]], notes: tuple[str, ...] = ()) -> DryRun:
    """The plan and its prediction beside what was sent, and held at most, by pipeline rank."""
    broken: list[str] = []
    rows: list[Row] = []
    for rank, (traffic, _) in seen.items():
        try:
            rows += _rows(rank, expected_traffic(plan, costs, rank), traffic)
        except UsageError as error:
            broken = [f"the plan breaks a rule of sharding, so that nobody knows what it sends: {error.message}"]
    written = _memories(plan.prediction, plan.mesh.pp)
    memory = tuple(Memory(rank, written[rank].allocated, peak) for rank, (_, peak) in seen.items() if rank < len(written))
    differences = [*broken, *_sent(rows, plan.mesh.pp), *_held(memory, plan.mesh.pp), *_repriced(plan, costs)]
    return DryRun(tuple(rows), memory, tuple(differences), notes)


def _rows(rank: int, expected: Traffic, seen: Traffic) -> list[Row]:
    keys = total((key, Amount(1)) for traffic in (expected, seen) for key in traffic)
    return [Row(rank, *key, expected.get(key, Amount()), seen.get(key, Amount())) for key in keys]


def _memories(prediction: Prediction, pp: int) -> tuple[MemoryBreakdown, ...]:
    return tuple(stage.memory for stage in prediction.stages) if pp > 1 else (prediction.memory,)


def _where(rank: int, pp: int) -> str:
    return f" on pipeline rank {rank}" if pp > 1 else ""


def _sent(rows: list[Row], pp: int) -> Iterator[str]:
    for row in rows:
        name, where = row.kind, _where(row.rank, pp)
        if row.expected.count != row.seen.count:
            yield f"{row.axis}: {row.seen.count} {name} ran{where}, the plan says {row.expected.count}."
        elif not row.agrees:
            sizes = show(row.seen.bytes, BYTE), show(row.expected.bytes, BYTE)
            yield f"{row.axis}: {row.seen.count} {name} moved {sizes[0]}{where}, the plan says {sizes[1]}."


def _held(memory: tuple[Memory, ...], pp: int) -> Iterator[str]:
    for each in memory:
        if not each.agrees:
            sizes = show(each.measured, BYTE), show(each.predicted, BYTE)
            yield f"memory: the peak is {sizes[0]}{_where(each.rank, pp)}, the plan predicts {sizes[1]}."


def _repriced(plan: Plan, costs: CostModel) -> Iterator[str]:
    """Is the prediction that of the plan as it is written? Not after an edit."""
    try:
        now = costs.predict_plan(plan)
    except UsageError as error:
        yield f"the plan can't be priced: {error.message}"
        return
    pp = plan.mesh.pp
    if plan.prediction.stages or pp == 1:
        for rank, (a, b) in enumerate(zip(_memories(plan.prediction, pp), _memories(now, pp), strict=False)):
            if _differ(a.total, b.total):
                sizes = show(a.total, BYTE), show(b.total, BYTE)
                yield f"prediction: the plan's file says {sizes[0]} of memory{_where(rank, pp)}, its strategies need {sizes[1]}."
    if _differ(plan.prediction.step_time, now.step_time):
        yield (
            f"prediction: the plan's file says {plan.prediction.step_time:.4g} s a step, its strategies take "
            f"{now.step_time:.4g} s: was it edited?"
        )


def _differ(a: float, b: float) -> bool:
    return abs(a - b) > SAME * max(abs(a), abs(b))
