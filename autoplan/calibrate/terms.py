"""The terms of a profile that runs can correct, each by one factor on its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autoplan.hardware import Curve, HardwareProfile
from autoplan.units import Bytes

TERMS = {
    "products": "matrix products and attention",
    "memory": "kernels that move bytes, the optimizer",
    "launch": "the shortest time of a kernel, the host's time of DTensors",
    "links": "latency and bandwidth of collectives, waiting for other ranks",
}
_KEYS = {"products": ("matmul", "attention"), "memory": ("memory_efficiency",), "launch": ("launch", "dispatch")}
"""Keys of the device's sources."""


def scaled(profile: HardwareProfile, factors: Mapping[str, float]) -> HardwareProfile:
    """The profile with each term taking so many times as long. A curve that would pass 1 raises its nominal rate instead."""
    device = profile.device
    products, memory, links = (factors.get(term, 1.0) for term in ("products", "memory", "links"))
    (matmul, attention), more = _slower((device.matmul, device.attention), products)
    (moving,), wider = _slower((device.memory_efficiency,), memory)
    found = replace(
        device,
        peak=tuple((dtype, peak * more) for dtype, peak in device.peak),
        matmul=matmul,
        attention=attention,
        bandwidth=device.bandwidth * wider,
        memory_efficiency=moving,
        launch=device.launch * factors.get("launch", 1.0),
        dispatch=device.dispatch * factors.get("launch", 1.0),
    )
    joined = []
    for link in profile.links:
        (efficiency,), wider = _slower((link.efficiency,), links)
        joined.append(replace(link, efficiency=efficiency, bandwidth=link.bandwidth * wider, latency=link.latency * links))
    return replace(profile, device=found, links=tuple(joined), jitter=profile.jitter * links)


def _slower(curves: Sequence[Curve], factor: float) -> tuple[list[Curve], float]:
    """The curves over `factor`, and how many times the nominal rate must be for them to stay below 1."""
    if factor == 1.0:
        return list(curves), 1.0
    gain = max(1.0, max(fraction for curve in curves for _, fraction in curve.points) / factor)
    return [Curve(tuple((size, fraction / factor / gain) for size, fraction in curve.points)) for curve in curves], gain


def corrected(profile: HardwareProfile, factors: Mapping[str, float], reserved: Bytes, date: str, runs: str) -> HardwareProfile:
    """The scaled profile with `reserved` more bytes, dated, whose sources say what was done."""
    found = scaled(profile, factors)
    device = replace(found.device, reserved=found.device.reserved + reserved)
    note = f"corrected {date} by {runs}"
    told = _sources(device.source)
    for term, keys in _KEYS.items():
        for key in (key for key in keys if getattr(device, key)):  # a machine need not have a dispatch
            told[key] = f"{told.get(key, told.get('all', ''))}; {note}: {factors[term]:.3g} times as long".removeprefix("; ")
    if reserved:
        told["reserved"] = f"{told.get('reserved', told.get('all', ''))}; {note}".removeprefix("; ")
    links = []
    for link in found.links:
        mine = _sources(link.source)
        mine = {key: f"{text}; {note}: {factors['links']:.3g} times as long" for key, text in mine.items()}
        links.append(replace(link, source=_joined(mine)))
    whole = _sources(found.source)
    if found.jitter:
        whole["jitter"] = f"{whole.get('jitter', whole.get('all', ''))}; {note}: {factors['links']:.3g} times as long"
    device = replace(device, source=_joined(told))
    return replace(found, device=device, links=tuple(links), measured=date, source=_joined(whole))


def _sources(source: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in source.splitlines() if ": " in line) or {"all": source}


def _joined(told: Mapping[str, str]) -> str:
    return "\n".join(f"{key}: {text}" for key, text in told.items())
