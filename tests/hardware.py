"""A machine with round numbers, for tests that must not depend on a shipped profile."""

from __future__ import annotations

from dataclasses import replace

from autoplan.hardware import Curve, Device, HardwareProfile, Link

FLAT = Curve(((1.0, 0.5),))


def machine(memory: float = 80e9, bandwidth: float = 300e9, network: float = 25e9, span: int = 8) -> HardwareProfile:
    device = Device(
        name="test",
        memory=memory,
        reserved=0.0,
        bandwidth=2e12,
        peak=(("bfloat16", 400e12), ("float32", 100e12), ("float64", 50e12)),
        matmul=FLAT,
        attention=FLAT,
        memory_efficiency=Curve(((1.0, 0.8),)),
        launch=4e-6,
        source="round numbers",
    )
    links = (
        Link(name="fast", span=span, bandwidth=bandwidth, latency=3e-6, efficiency=Curve(((1.0, 0.6),)), source="round numbers"),
        Link(name="slow", span=0, bandwidth=network, latency=10e-6, efficiency=Curve(((1.0, 0.8),)), source="round numbers"),
    )
    return HardwareProfile(name="test-8x", device=device, links=links, overlap=0.1, backend="nccl")


def uneven(profile: HardwareProfile) -> HardwareProfile:
    """The same on the host itself, where DTensors take time, ranks wait for each other, and are more than cores."""
    device = replace(profile.device, dispatch=2e-5)
    return replace(profile, backend="gloo", jitter=1e-3, sharing=1.5, device=device, source="all: round numbers")
