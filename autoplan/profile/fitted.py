"""From measurements to a profile, and back: what the profile says of each measurement. No torch in here.

Rates have no data sheet here, so the nominal rate is the best one seen and the curves say what other sizes reach of it.

A collective of `n` ranks in one domain takes `launch + s (r (n - 1) latency + x / (bandwidth e(x)))` (cost.collectives; r = 2 for
all_reduce). For every latency that no message contradicts there is a best curve; the pair with the least error is taken. The
slowdown `s` of a kind is the median of how far it is from that; both are repeated until they fit each other. Messages are timed
one after another, so that nobody waits; a small one after products takes longer by what cost.collectives says of waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, log2, sqrt
from statistics import median

from autoplan.cost.collectives import collective_time, late, waiting
from autoplan.cost.compute import kernel_time, memory_time
from autoplan.errors import UsageError
from autoplan.hardware import Curve, Device, HardwareProfile, Link
from autoplan.measurement import COLLECTIVES, Measurement, Operation
from autoplan.profile.bench import Machine
from autoplan.profile.fit import Sample, error_of, fit_curve, fractions, rounded
from autoplan.profile.suite import MOVERS
from autoplan.units import Seconds

_ROUNDS = 4
"""Rings and slowdowns are fitted in turn so often."""
_ALIKE = 0.03
"""A kind of collective that is no further from the others is as fast as they."""
_GRID = 12
"""Latencies that are tried, twice: over all, then about the best."""
_LARGE = 16
"""Messages within this factor of the largest tell the nominal bandwidth."""
_LEFT = 0.01
"""Share of a message's time that its bytes take at least, however long the latency."""
_FLOOR = 1.25
"""Kernels that take less than so many launches say nothing of the rate."""


@dataclass(frozen=True, slots=True)
class Residual:
    """What a profile says of something that was measured."""

    measurement: Measurement
    predicted: Seconds

    @property
    def error(self) -> float:
        return self.predicted / self.measurement.seconds - 1


def fitted(
    found: Sequence[Measurement], machine: Machine, name: str, date: str, borrowed: HardwareProfile | None = None
) -> HardwareProfile:
    """The profile that `found` makes. Links that one rank cannot measure, and the overlap, are those of `borrowed`.

    Raises `UsageError` when something is missing without which there is no profile.
    """
    device = _device(found, machine)
    links, overlap, overlap_source = _links(found, machine, device.launch), _overlap(found), _here(machine)
    jitter, said = _jitter(found, device), f"overlap: {overlap_source}: an all_reduce beside matrix products, and both alone"
    if not links:
        if borrowed is None:
            raise UsageError("one device alone has no links to measure.", "Say whose they are: --links h100-sxm-8x.")
        links, overlap, jitter = borrowed.links, borrowed.overlap, borrowed.jitter
        said = f"all: as in {borrowed.name}: one device alone has nothing to overlap with"
    elif jitter:
        said += f"\njitter: {overlap_source}: the smallest all_reduce, after products and alone"
    if machine.sharing > 1:
        said += f"\nsharing: {machine.ranks} ranks, {machine.about}"
    return HardwareProfile(
        name=name,
        device=device,
        links=links,
        overlap=rounded(overlap),
        jitter=rounded(jitter),
        sharing=machine.sharing,
        backend=machine.backend,
        measured=date,
        source=said,
    )


def predicted(operation: Operation, profile: HardwareProfile) -> Seconds | None:
    """Seconds of an operation by the cost model; None for what a profile has no number for."""
    device, kind = profile.device, operation.kind
    if kind == "launch":
        return device.launch * operation.shape[0]
    if kind == "dispatch":
        return (device.launch + device.dispatch) * operation.shape[0]
    if kind == "matmul":
        return kernel_time("linear", operation.size, 0.0, 1, operation.dtype, device)
    if kind in ("attention", "attention_backward"):
        return kernel_time("attention", operation.size, 0.0, 1, operation.dtype, device)
    if kind in MOVERS:
        return kernel_time("pointwise", 0.0, operation.size, 1, operation.dtype, device)
    if kind == "optimizer":
        return memory_time(operation.size, device)
    if kind == "arrival":
        alone = collective_time("all_reduce", operation.size, operation.group, operation.stride, profile)
        return alone + waiting(_before(operation, profile.device), 1, operation.group, profile)
    if kind in COLLECTIVES:
        return collective_time(kind, operation.size, operation.group, operation.stride, profile)
    return None


def residuals(profile: HardwareProfile, found: Iterable[Measurement]) -> list[Residual]:
    """What the profile says of everything that it was fitted to."""
    said = [(each, predicted(each.operation, profile)) for each in found]
    return [Residual(each, seconds) for each, seconds in said if seconds is not None]


def summary(rows: Sequence[Residual]) -> list[tuple[str, int, float]]:
    """(kind, number of measurements, mean absolute relative error), in the order in which they were measured."""
    kinds = dict.fromkeys(_kind(row.measurement.operation) for row in rows)
    told = []
    for kind in kinds:
        mine = [row for row in rows if _kind(row.measurement.operation) == kind]
        error = error_of([row.predicted for row in mine], [row.measurement.seconds for row in mine])
        told.append((kind, len(mine), error))
    return told


def _kind(operation: Operation) -> str:
    if operation.group > 1:
        apart = f", {operation.stride} apart" if operation.stride > 1 else ""
        return f"{operation.kind}, {operation.group} ranks{apart}"
    return f"{operation.kind}, {operation.dtype}" if operation.kind == "matmul" else operation.kind


def _here(machine: Machine) -> str:
    ranks = f"{machine.ranks} ranks at once, " if machine.ranks > 1 else ""
    return f"measured: {ranks}{machine.about}"


def _device(found: Sequence[Measurement], machine: Machine) -> Device:
    launch, dispatched = (rounded(m.seconds / m.operation.shape[0]) for m in (_one(found, "launch"), _one(found, "dispatch")))
    dispatch = rounded(max(0.0, dispatched - launch))
    products = [m for m in found if m.operation.kind == "matmul"]
    attention = [m for m in found if m.operation.kind in ("attention", "attention_backward")]
    moved = [m for m in found if m.operation.kind in MOVERS]
    if not (products and attention and moved):
        raise UsageError("matrix products, attention or memory were not measured.", "Give more time: --budget 60s.")
    main = products[0].operation.dtype
    peak = rounded(max(_rate(m) for m in products if m.operation.dtype == main))
    matmul = _curve([m for m in products if m.operation.dtype == main], peak, launch)
    peaks = {main: peak}
    for dtype in dict.fromkeys(m.operation.dtype for m in products if m.operation.dtype != main):
        mine = [m for m in products if m.operation.dtype == dtype]
        peaks[dtype] = rounded(median(_rate(m) / matmul.at(m.operation.size) for m in mine))
    bandwidth = rounded(max(_rate(m) for m in moved))
    here = _here(machine)
    sizes = f"{min(m.operation.shape[1] for m in attention)} to {max(m.operation.shape[1] for m in attention)} tokens"
    return Device(
        name=machine.device,
        memory=machine.memory,
        reserved=machine.reserved,
        bandwidth=bandwidth,
        peak=tuple(peaks.items()),
        matmul=matmul,
        attention=_curve(attention, peaks[main], launch),
        memory_efficiency=_curve(moved, bandwidth, launch, growing=False),
        launch=launch,
        dispatch=dispatch,
        source="\n".join(
            (
                f"memory: {machine.memory_source}",
                f"reserved: {machine.reserved_source}",
                f"bandwidth: {here}: the best of adding, gelu, norms and sums (small ones may stay in a cache)",
                f"peak: {here}: the best product in {main}; of other dtypes so that they follow its curve",
                f"matmul: {here}: {len(products)} {main} products, square and not, in the layouts of forward and backward",
                f"attention: {here}: causal attention forward and backward, {main}, {sizes}",
                f"memory_efficiency: {here}: adding, gelu, layer norm, softmax, sums, together",
                f"launch: {here}: forward and backward of a chain of products with one element, a kernel's share",
                f"dispatch: {here}: how much longer the same takes with a DTensor",
            )
        ),
    )


def _one(found: Sequence[Measurement], kind: str) -> Measurement:
    mine = [m for m in found if m.operation.kind == kind]
    if not mine:
        raise UsageError(f"'{kind}' was not measured.", "Give more time: --budget 60s.")
    return mine[0]


def _rate(m: Measurement) -> float:
    return m.operation.size / m.seconds


def _curve(found: Sequence[Measurement], rate: float, launch: Seconds, growing: bool = True) -> Curve:
    """The curve with a knot at every size that is at least half as large again as the one before."""
    filling = [m for m in found if m.seconds > _FLOOR * launch] or list(found)
    samples = fractions([(m.operation.size, m.seconds) for m in filling], rate)
    return fit_curve(samples, _knots(size for size, _ in samples), growing)


def _knots(sizes: Iterable[float], apart: float = 1.9) -> list[float]:
    """From the largest downwards."""
    knots: list[float] = []
    for size in sorted(sizes, reverse=True):
        if not knots or knots[-1] / size >= apart:
            knots.append(size)
    return knots[::-1]


def _links(found: Sequence[Measurement], machine: Machine, launch: Seconds) -> tuple[Link, ...]:
    """One link within a host and one between hosts, as far as there are such."""
    inside = machine.per_node if machine.per_node > 1 else machine.ranks
    within = [m for m in found if m.operation.kind in COLLECTIVES and m.operation.stride == 1]
    between = [m for m in found if m.operation.kind in COLLECTIVES and m.operation.stride > 1]
    here, links = _here(machine), []
    if within:
        span = inside if between else 0
        links.append(
            _link(f"{machine.backend} within a host", span, within, launch, lambda kind, n: _trips(kind) * (n - 1), here)
        )
    if between:
        links.append(_link(f"{machine.backend} between hosts", 0, between, launch, _outer_hops, here))
    return tuple(links)


def _trips(kind: str) -> int:
    return 2 if kind == "all_reduce" else 1


def _outer_hops(kind: str, n: int) -> int:
    return 2 * min(n - 1, ceil(log2(n))) if kind == "all_reduce" else n - 1


def _sent(operation: Operation) -> float:
    """Bytes that one rank sends, as in cost.collectives."""
    n, kind = operation.group, operation.kind
    if kind == "send_recv":
        return operation.size
    return operation.size * _trips(kind) * (n - 1) / n / (n if kind == "all_to_all" else 1)


def _link(
    name: str, span: int, found: Sequence[Measurement], launch: Seconds, hops: Callable[[str, int], int], here: str
) -> Link:
    def steps(m: Measurement) -> int:
        return 1 if m.operation.kind == "send_recv" else hops(m.operation.kind, m.operation.group)

    slowdown = dict.fromkeys((m.operation.kind for m in found), 1.0)
    for _ in range(_ROUNDS):
        ring = [(_sent(m.operation), steps(m), (m.seconds - launch) / slowdown[m.operation.kind]) for m in found]
        latency, best, curve = _ring(ring)
        off = [seconds / (hops * latency + size / (best * curve.at(size))) for size, hops, seconds in ring]
        for kind in slowdown:
            slowdown[kind] *= median(ratio for ratio, m in zip(off, found, strict=True) if m.operation.kind == kind)
        middle = median(slowdown.values())
        slowdown = {kind: factor / middle for kind, factor in slowdown.items()}
    kinds = ", ".join(dict.fromkeys(m.operation.kind for m in found))
    ranks = " and ".join(map(str, sorted({m.operation.group for m in found})))
    return Link(
        name=name,
        span=span,
        bandwidth=rounded(best),
        latency=rounded(latency),
        efficiency=curve,
        slowdown=tuple((kind, rounded(factor)) for kind, factor in slowdown.items() if abs(factor - 1) > _ALIKE),
        source=f"latency: {here}: the smallest messages\nall: {here}: {len(found)} messages ({kinds}) of {ranks} ranks",
    )


Message = tuple[float, int, Seconds]
"""Bytes that a rank sends, steps of latency, seconds after the launch."""


def _ring(found: Sequence[Message]) -> tuple[Seconds, float, Curve]:
    """(latency, bandwidth, curve) with the least error: the best curve for each latency of a grid, then of a finer one."""
    knots = _knots((size for size, _, _ in found), apart=1.4)

    def tried(latency: Seconds) -> tuple[float, Seconds, float, Curve]:
        samples: list[Sample] = []
        for size, steps, seconds in found:
            samples += fractions([(size, seconds)], 1.0, steps * latency, _LEFT)
        shares = [size / rate / seconds for (size, rate), (_, _, seconds) in zip(samples, found, strict=True)]
        best = max(rate for size, rate in samples if size >= knots[-1] / _LARGE)
        curve = fit_curve([(size, rate / best) for size, rate in samples], knots, shares=shares)
        times = [steps * latency + size / (best * curve.at(size)) for size, steps, _ in found]
        return error_of(times, [seconds for _, _, seconds in found]), latency, best, curve

    most = max(min(seconds / steps for _, steps, seconds in found), 0.0)
    least = min((tried(most * i / _GRID) for i in range(_GRID + 1)), key=lambda each: each[0])
    near = (least[1] + most * (2 * i / _GRID - 1) / _GRID for i in range(_GRID + 1))
    least = min([least, *(tried(min(max(latency, 0.0), most)) for latency in near)], key=lambda each: each[0])
    return least[1:]


def _before(arrival: Operation, device: Device) -> Seconds:
    """How long the products take that run before it."""
    times, n = arrival.shape
    return times * kernel_time("linear", 2.0 * n**3, 0.0, 1, arrival.dtype, device)


def _jitter(found: Sequence[Measurement], device: Device) -> Seconds:
    """The standard deviation after a second, of which the mean wait of every group of ranks tells: least squares over the groups,
    where a wait is as uncertain as the time that it is a part of."""
    alone = {(m.operation.group, m.operation.stride, m.operation.size): m for m in found if m.operation.kind == "all_reduce"}
    told = seen = 0.0
    for m in (m for m in found if m.operation.kind == "arrival"):
        wait = m.seconds - alone[m.operation.group, m.operation.stride, m.operation.size].seconds
        per_jitter = late(m.operation.group) * sqrt(_before(m.operation, device))
        told, seen = told + wait * per_jitter / m.seconds**2, seen + (per_jitter / m.seconds) ** 2
    return max(0.0, told / seen) if seen else 0.0


def _overlap(found: Sequence[Measurement]) -> float:
    """What hidden communication costs: (both at once - the longer alone) / the shorter alone, from 0 to 1; 1 when unknown."""
    times = {m.operation.kind: m.seconds for m in found if m.operation.kind in ("products", "reduction", "together")}
    if len(times) < 3:
        return 1.0
    longer, shorter = max(times["products"], times["reduction"]), min(times["products"], times["reduction"])
    return min(1.0, max(0.0, (times["together"] - longer) / shorter))
