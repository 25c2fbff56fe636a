"""A profile that was measured here: in the terminal how well it fits, as a page its curves with the dots they go through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.text import Text

from autoplan.hardware import HardwareProfile
from autoplan.measurement import COLLECTIVES, Measurement, Operation
from autoplan.report import words
from autoplan.report.curves import Axis, Series, loglog
from autoplan.report.page import render
from autoplan.report.tables import table, titled
from autoplan.units import BYTE, BYTE_PER_SECOND, FLOP, FLOP_PER_SECOND, SECOND, show


class Fitted(Protocol):
    """A measurement, and what the profile says of it."""

    @property
    def measurement(self) -> Measurement: ...
    @property
    def predicted(self) -> float: ...
    @property
    def error(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Row:
    """A kind of operation: how many of it were measured, how far the profile is from them, how noisy they are."""

    kind: str
    number: int
    error: float
    worst: float
    noise: float


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture with its legend."""

    title: str
    picture: Markup
    legend: tuple[tuple[int, str], ...]
    note: str


def rows(fits: Sequence[Fitted]) -> list[Row]:
    """One for each kind, in the order in which they were measured."""
    found = []
    for kind in dict.fromkeys(_kind(fit.measurement.operation) for fit in fits):
        mine = [fit for fit in fits if _kind(fit.measurement.operation) == kind]
        errors = [abs(fit.error) for fit in mine]
        noise = max(fit.measurement.spread / fit.measurement.seconds for fit in mine)
        found.append(Row(kind, len(mine), sum(errors) / len(errors), max(errors), noise))
    return found


def _kind(operation: Operation) -> str:
    if operation.group > 1:
        apart = f", {operation.stride} apart" if operation.stride > 1 else ""
        return f"{operation.kind}, {operation.group} ranks{apart}"
    return f"{operation.kind}, {operation.dtype}" if operation.kind == "matmul" else operation.kind


def summary(profile: HardwareProfile, fits: Sequence[Fitted]) -> RenderableType:
    """What was found, and how well it fits."""
    device = profile.device
    lines = [
        Text(f"{words.clean(profile.name)}: {words.clean(device.name)}", style="bold"),
        Text(f"{', '.join(f'{show(peak, FLOP_PER_SECOND)} in {dtype}' for dtype, peak in device.peak)}"),
        Text(
            f"memory {show(device.bandwidth, BYTE_PER_SECOND)}, " + ", ".join(f"{name} {time}" for name, time in _host(profile))
        ),
        *(
            Text(f"{words.clean(link.name)} {show(link.bandwidth, BYTE_PER_SECOND)}, latency {show(link.latency, SECOND)}")
            for link in profile.links
        ),
    ]
    made = table(("<", "measured"), (">", "times"), (">", "mean error"), (">", "worst"), (">", "noise"))
    for row in rows(fits):
        made.add_row(row.kind, str(row.number), words.percent(row.error), words.percent(row.worst), words.percent(row.noise))
    return Group(*lines, titled("How far the profile is from what it was fitted to", made))


def _host(profile: HardwareProfile) -> Iterator[tuple[str, str]]:
    """What a kernel, a DTensor and other ranks cost, whatever their size."""
    yield "launch", show(profile.device.launch, SECOND)
    if profile.device.dispatch:
        yield "DTensor", show(profile.device.dispatch, SECOND)
    if profile.jitter:
        yield "jitter", f"{show(profile.jitter, SECOND)} in a second"


def page(profile: HardwareProfile, fits: Sequence[Fitted], measurements: Sequence[Measurement]) -> str:
    """The profile as one self-contained HTML page."""
    device = profile.device
    copies = [m for m in measurements if m.operation.kind in ("host_to_device", "device_to_host")]
    facts = [
        ("Device", f"{device.name}, {show(device.memory, BYTE)} a rank"),
        *((f"Peak in {dtype}", show(peak, FLOP_PER_SECOND)) for dtype, peak in device.peak),
        ("Memory", show(device.bandwidth, BYTE_PER_SECOND)),
        *((name[0].upper() + name[1:], time) for name, time in _host(profile)),
        *(
            (link.name, f"{show(link.bandwidth, BYTE_PER_SECOND)}, latency {show(link.latency, SECOND)}")
            for link in profile.links
        ),
        ("Overlap", f"{words.percent(profile.overlap)} of hidden communication slows computation down"),
        *((m.operation.kind.replace("_", " ").capitalize(), show(m.operation.size / m.seconds, BYTE_PER_SECOND)) for m in copies),
    ]
    return render(
        "measured.html.j2",
        profile=profile,
        facts=facts,
        rows=rows(fits),
        charts=[chart for chart in _charts(profile, fits) if chart.picture],
        sources=[line.partition(": ")[::2] for line in (*device.source.splitlines(), *profile.source.splitlines())],
    )


def _charts(profile: HardwareProfile, fits: Sequence[Fitted]) -> Iterable[Chart]:
    yield _roofline(profile, fits)
    calls = ("launch", "dispatch")
    single = [fit for fit in fits if fit.measurement.operation.group == 1 and fit.measurement.operation.kind not in calls]
    products = [fit for fit in single if fit.measurement.operation.kind == "matmul"]
    attention = [fit for fit in single if fit.measurement.operation.kind.startswith("attention")]
    moving = [fit for fit in single if fit not in products and fit not in attention]
    for title, mine in (("Matrix products", products), ("Attention", attention)):
        series = _by(mine, lambda op: " ".join(filter(None, (op.kind.replace("_", " "), op.layout, op.dtype))))
        yield _chart(title, series, ("FLOPs of one kernel", FLOP), ("rate", FLOP_PER_SECOND), _rate)
    series = _by(moving, lambda op: op.kind.replace("_", " "))
    yield _chart("Kernels that move bytes", series, ("bytes moved", BYTE), ("rate", BYTE_PER_SECOND), _rate)
    sent = [fit for fit in fits if fit.measurement.operation.kind in COLLECTIVES]
    for group, stride in dict.fromkeys((f.measurement.operation.group, f.measurement.operation.stride) for f in sent):
        mine = [f for f in sent if (f.measurement.operation.group, f.measurement.operation.stride) == (group, stride)]
        title = f"Collectives of {group} ranks" + (f", {stride} apart" if stride > 1 else "")
        series = _by(mine, lambda op: op.kind.replace("_", " "))
        yield _chart(title, series, ("bytes of the unsharded tensor", BYTE), ("seconds", SECOND), _seconds)


def _by(fits: Sequence[Fitted], name: Callable[[Operation], str]) -> dict[str, list[Fitted]]:
    found: dict[str, list[Fitted]] = {}
    for fit in fits:
        found.setdefault(name(fit.measurement.operation), []).append(fit)
    return found


def _rate(operation: Operation, seconds: float) -> float:
    return operation.size / seconds


def _seconds(_: Operation, seconds: float) -> float:
    return seconds


def _chart(title: str, series: dict[str, list[Fitted]], x: Axis, y: Axis, value: Callable[[Operation, float], float]) -> Chart:
    drawn = []
    for name, mine in series.items():
        ordered = sorted(mine, key=lambda fit: fit.measurement.operation.size)
        dots = tuple(
            (op.size, value(op, fit.measurement.seconds), f"{op}: {show(fit.measurement.seconds, SECOND)} ({fit.error:+.1%})")
            for fit in ordered
            for op in [fit.measurement.operation]
        )
        line = tuple((fit.measurement.operation.size, value(fit.measurement.operation, fit.predicted)) for fit in ordered)
        drawn.append(Series(name, dots, line))
    legend = tuple((number, each.name) for number, each in enumerate(drawn))
    return Chart(title, Markup(loglog(drawn, title, x, y)), legend, "Dots are measured, lines are the profile.")


def _roofline(profile: HardwareProfile, fits: Sequence[Fitted]) -> Chart:
    """FLOP/s of the matrix products by FLOPs for each byte of their operands, under the device's two limits."""
    device, drawn = profile.device, []
    products = [fit.measurement for fit in fits if fit.measurement.operation.kind == "matmul"]
    for dtype, peak in device.peak:
        mine = [m for m in products if m.operation.dtype == dtype]
        dots = tuple((_intensity(m.operation, dtype), m.operation.size / m.seconds, str(m.operation)) for m in mine)
        if not dots:
            continue
        low, high = min(peak / device.bandwidth / 4, *(x for x, _, _ in dots)), max(x for x, _, _ in dots) * 2
        ridge = min(max(peak / device.bandwidth, low), high)
        roof = ((low, min(peak, low * device.bandwidth)), (ridge, min(peak, ridge * device.bandwidth)), (high, peak))
        drawn.append(Series(dtype, dots, roof))
    legend = tuple((number, each.name) for number, each in enumerate(drawn))
    picture = loglog(drawn, "Roofline", ("FLOPs for each byte", None), ("rate", FLOP_PER_SECOND))
    return Chart("Roofline", Markup(picture), legend, "Dots are matrix products; lines are the bandwidth of memory and the peak.")


def _intensity(operation: Operation, dtype: str) -> float:
    m, n, k = operation.shape
    width = {"float64": 8, "float32": 4}.get(dtype, 2)
    return operation.size / (width * (m * k + k * n + m * n))
