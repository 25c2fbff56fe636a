"""What a machine can do: a device and the links between devices, with measured efficiencies (numbers: `hwprofiles/`)."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import log

from autoplan.errors import UsageError
from autoplan.units import Bytes, BytesPerSecond, FlopsPerSecond, Seconds


@dataclass(frozen=True)
class Curve:
    """A fraction (0 to 1) of a nominal rate by the size of the work, interpolated over log(size), flat outside its points."""

    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        sizes = self._sizes
        i = bisect_right(sizes, size)
        if i == 0:
            return self.points[0][1]
        if i == len(sizes):
            return self.points[-1][1]
        (x0, y0), (x1, y1) = self.points[i - 1], self.points[i]
        return y0 + (y1 - y0) * log(size / x0) / log(x1 / x0)

    @cached_property
    def _sizes(self) -> tuple[float, ...]:
        return tuple(size for size, _ in self.points)


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator."""

    name: str
    memory: Bytes
    """All of the device's memory."""
    reserved: Bytes
    """What the driver, the communication library and the allocator's fragmentation take of it."""
    bandwidth: BytesPerSecond
    """Nominal memory bandwidth."""
    peak: tuple[tuple[str, FlopsPerSecond], ...]
    """Nominal dense matrix FLOP/s by dtype; "float8" is told where the device has it, for published runs."""
    matmul: Curve
    """Achieved fraction of `peak` by the FLOPs of one matrix multiplication."""
    attention: Curve
    """Achieved fraction of `peak` by the FLOPs of one attention kernel."""
    memory_efficiency: Curve
    """Achieved fraction of `bandwidth` by the bytes that one kernel moves."""
    launch: Seconds
    """Shortest time that one kernel takes, launch included."""
    source: str
    dispatch: Seconds = field(default=0.0, repr=False)
    """What the host needs beyond that for one operation on DTensors, which tp and cp compute with."""

    def peak_of(self, dtype: str) -> FlopsPerSecond:
        """Nominal matrix FLOP/s in `dtype`. Raises `UsageError` when the profile has none."""
        peaks = dict(self.peak)
        if dtype not in peaks:
            raise UsageError(f"hardware device '{self.name}' has no peak for {dtype}.", f"It knows {', '.join(peaks)}.")
        return peaks[dtype]


@dataclass(frozen=True, kw_only=True)
class Link:
    """One level of the network: joins groups of `span` neighbouring devices."""

    name: str
    span: int
    """How many devices it joins: 8 within a node; 0 means any number (the outermost level)."""
    bandwidth: BytesPerSecond
    """Nominal, one direction, of one device."""
    latency: Seconds
    """Of one step of a ring."""
    efficiency: Curve
    """Achieved fraction of `bandwidth` by the bytes that one device sends in a collective."""
    source: str
    all_reduce_gain: float = 1.0
    """How many times faster than a ring an all_reduce is, because the switch adds up (NVLink SHARP)."""
    slowdown: tuple[tuple[str, float], ...] = field(default=(), repr=False)
    """Kinds of collective that take so many times as long here as the others: a library does not do all of them equally well."""

    def slowdown_of(self, kind: str) -> float:
        return next((factor for name, factor in self.slowdown if name == kind), 1.0)


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """A machine: a device and its links, innermost first."""

    name: str
    device: Device
    links: tuple[Link, ...]
    overlap: float
    """Fraction (0 to 1) of hidden communication time that slows the computation it hides under."""
    backend: str
    """The torch.distributed backend: nccl or gloo."""
    jitter: Seconds = field(default=0.0, repr=False)
    """How differently long ranks need for the same second of work: the standard deviation. It grows as the root of the time."""
    sharing: float = field(default=1.0, repr=False)
    """Ranks that share one device, as more ranks than cores do: kernels are as slow as when all of them compute, and who waits
    for its turn in a pipeline leaves the device to the others."""
    measured: str | None = None
    """Date of the measurement, when there is one."""
    source: str = ""
    """Of what belongs to the machine as a whole."""

    def link(self, group: int) -> Link:
        """The innermost link that joins `group` neighbouring devices."""
        for link in self.links:
            if link.span == 0 or link.span >= group:
                return link
        raise UsageError(f"hardware '{self.name}' joins at most {self.links[-1].span} devices, {group} are asked for.")

    @property
    def computes_on_host(self) -> bool:
        """Whether the device is the host itself, a CPU, which can't go on while a kernel runs."""
        return self.backend == "gloo"

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every number that a plan's prediction depends on: no workload multiplies in float8."""
        device = replace(self.device, peak=tuple(entry for entry in self.device.peak if entry[0] != "float8"))
        slowdowns = [link.slowdown for link in self.links if link.slowdown]
        optional = {"dispatch": device.dispatch, "jitter": self.jitter, "sharing": self.sharing - 1.0}
        numbers = (device, self.links, self.overlap, *slowdowns, *((name, value) for name, value in optional.items() if value))
        return hashlib.sha256(repr(numbers).encode()).hexdigest()[:16]
