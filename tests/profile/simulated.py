"""A machine with known curves: its times are those of the cost model, with noise and now and then an outlier."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from autoplan.hardware import Curve, Device, HardwareProfile, Link
from autoplan.measurement import Operation
from autoplan.profile.bench import Machine
from autoplan.profile.fitted import predicted

KIB, MIB = 2.0**10, 2.0**20

DEVICE = Device(
    name="simulated",
    memory=80e9,
    reserved=1e9,
    bandwidth=2e12,
    peak=(("bfloat16", 400e12), ("float32", 50e12)),
    matmul=Curve(((1e9, 0.2), (2e10, 0.5), (1e12, 0.8))),
    attention=Curve(((1e9, 0.1), (2e11, 0.45))),
    memory_efficiency=Curve(((MIB, 0.5), (64 * MIB, 0.85), (1024 * MIB, 0.93))),
    launch=5e-6,
    source="all: simulated",
    dispatch=60e-6,
)


def truth(hosts: int) -> HardwareProfile:
    inner = Link(
        name="inner",
        span=4 if hosts > 1 else 0,
        bandwidth=200e9,
        latency=2e-6,
        efficiency=Curve(((64 * KIB, 0.15), (MIB, 0.4), (64 * MIB, 0.85))),
        source="all: simulated",
        slowdown=(("all_gather", 1.7), ("send_recv", 0.8)),
    )
    outer = Link(
        name="outer",
        span=0,
        bandwidth=25e9,
        latency=12e-6,
        efficiency=Curve(((64 * KIB, 0.2), (4 * MIB, 0.6), (128 * MIB, 0.9))),
        source="all: simulated",
    )
    links = (inner, outer) if hosts > 1 else (inner,)
    return HardwareProfile(
        name="simulated", device=DEVICE, links=links, overlap=0.3, jitter=30e-6, backend="nccl", source="all: simulated"
    )


@dataclass
class SimulatedBench:
    """Runs 4 ranks on each of `hosts`. `noise`: relative; one timing in ten takes three times as long."""

    hosts: int = 1
    noise: float = 0.015
    profile: HardwareProfile | None = None
    now: float = 0.0
    asked: list[Operation] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(1))

    @property
    def machine(self) -> Machine:
        return Machine(
            device="simulated", accelerator=True, memory=80e9, reserved=1e9, backend="nccl",
            hosts=tuple(f"node{host}" for host in range(self.hosts) for _ in range(4)),
            about="simulated", memory_source="simulated", reserved_source="simulated",
        )  # fmt: skip

    def exact(self, operation: Operation) -> float:
        profile = self.profile or truth(self.hosts)
        if operation.kind in ("products", "reduction", "together"):
            return {"products": 3e-3, "reduction": 2e-3, "together": 3e-3 + profile.overlap * 2e-3}[operation.kind]
        return predicted(operation, profile) or 1e-3

    def times(self, operation: Operation, seconds: float) -> Sequence[float]:
        self.asked.append(operation)
        exact = self.exact(operation)
        runs = max(5, min(40, int(seconds / exact)))
        found = [exact * self.random.gauss(1, self.noise) * (3 if self.random.random() < 0.1 else 1) for _ in range(runs)]
        self.now += sum(found)
        return found

    def clock(self) -> float:
        return self.now
