"""What was measured: an operation with its seconds, and the steps of a real training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from statistics import median

from autoplan.errors import UsageError
from autoplan.units import Bytes, Seconds

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
"""Kinds of operation that need more than one rank; their `size` is that of the unsharded tensor."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that can be timed. Equal operations are the same measurement, so that a run can be resumed."""

    kind: str
    """matmul, attention, attention_backward, a kind of kernel that moves bytes, one of COLLECTIVES, launch, together, ..."""
    size: float
    """FLOPs of products and attention, else bytes."""
    dtype: str = "float32"
    shape: tuple[int, ...] = ()
    layout: str = ""
    """Of a matrix product's operands: nn, nt or tn, as forward and backward of a linear layer have them."""
    group: int = 1
    """Ranks of a collective ..."""
    stride: int = 1
    """... and how far they are apart. All groups of this shape work at the same time, as they do in a plan."""

    @property
    def series(self) -> tuple[str, str, int, int]:
        """Operations that differ in their size alone."""
        return self.kind + self.layout, self.dtype, self.group, self.stride

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape)) or f"{self.size:.0f} bytes"
        return f"{self.kind} {shape}, {self.dtype}" + (f", {self.group} ranks" if self.group > 1 else "")


@dataclass(frozen=True, slots=True)
class Measurement:
    """The median of several timings of an operation, all ranks working at once."""

    operation: Operation
    seconds: Seconds
    spread: Seconds
    """Median distance from the median (MAD)."""
    runs: int


def summarised(operation: Operation, times: Sequence[Seconds]) -> Measurement:
    """Median and MAD of `times`. Raises `UsageError` when a time is no time."""
    wrong = [seconds for seconds in times if not (isfinite(seconds) and seconds > 0)]
    if wrong or not times:
        raise UsageError(
            f"the timing of '{operation}' gave {wrong[0] if wrong else 'nothing'}, which is no time.",
            "Try again; if it stays so, the clock of this machine cannot be used.",
        )
    middle = median(times)
    return Measurement(operation, middle, median(abs(seconds - middle) for seconds in times), len(times))


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Median seconds of a step on the slowest rank, by what was running; zero where it was not looked at."""

    forward: Seconds = 0.0
    backward: Seconds = 0.0
    communication: Seconds = 0.0
    optimizer: Seconds = 0.0

    def items(self) -> Iterator[tuple[str, Seconds]]:
        for each in fields(self):
            yield each.name, getattr(self, each.name)

    def __bool__(self) -> bool:
        return any(seconds for _, seconds in self.items())


@dataclass(frozen=True, kw_only=True)
class MeasuredSteps:
    """Steps of a real run, warm-up left out: of every step the seconds of the slowest rank."""

    seconds: tuple[Seconds, ...]
    ranks: int
    device: str
    peak_memory: Bytes | None = None
    """Of the fullest rank; None where it cannot be read."""
    phases: Phases = field(default_factory=Phases)
    about: Mapping[str, str] = field(default_factory=dict)
    """What else the run said of itself: versions, the plan's name."""

    @property
    def step_time(self) -> Seconds:
        return median(self.seconds)
