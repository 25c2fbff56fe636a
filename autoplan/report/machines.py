"""The hardware profiles that are shipped, for people and for programs: pure functions of `HardwareProfile`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from autoplan.hardware import HardwareProfile
from autoplan.report import words
from autoplan.report.tables import table
from autoplan.units import BYTE_PER_SECOND, FLOP_PER_SECOND, show


def as_dicts(profiles: Sequence[HardwareProfile]) -> list[dict[str, Any]]:
    """The profiles as plain data, in base units."""
    return [
        {
            "name": profile.name,
            "device": profile.device.name,
            "memory": profile.device.memory,
            "reserved": profile.device.reserved,
            "bandwidth": profile.device.bandwidth,
            "peak": dict(profile.device.peak),
            "links": [
                {
                    "name": link.name,
                    "span": link.span,
                    "bandwidth": link.bandwidth,
                    "latency": link.latency,
                    "source": link.source,
                }
                for link in profile.links
            ],
            "backend": profile.backend,
            "source": profile.device.source,
            "measured": profile.measured,
            "fingerprint": profile.fingerprint,
        }
        for profile in profiles
    ]


def catalog(profiles: Sequence[HardwareProfile]) -> RenderableType:
    """One line for each profile."""
    made = table(("<", "name"), ("<", "device"), (">", "memory"), (">", "bf16"), ("<", "links"))
    for profile in profiles:
        links = ", ".join(f"{words.clean(link.name)} {show(link.bandwidth, BYTE_PER_SECOND)}" for link in profile.links)
        peak = dict(profile.device.peak).get("bfloat16")
        rate = "-" if peak is None else show(peak, FLOP_PER_SECOND)
        device = words.clean(profile.device.name)
        made.add_row(Text(words.clean(profile.name)), Text(device), words.size(profile.device.memory), rate, Text(links))
    return made


def details(profile: HardwareProfile) -> RenderableType:
    """One profile with the source of its numbers."""
    device = profile.device
    lines = [
        Text(f"{words.clean(profile.name)}: {words.clean(device.name)}", style="bold"),
        Text(f"{words.size(device.memory)} of memory, {words.size(device.reserved)} of it reserved"),
        Text(f"memory bandwidth {show(device.bandwidth, BYTE_PER_SECOND)}"),
        *(Text(f"source of {line}", style="dim") for line in _lines(device.source)),
        Text(f"measured: {profile.measured or 'never'}; backend {profile.backend}", style="dim"),
        Text(""),
    ]
    peaks = table(("<", "dtype"), (">", "peak"), (">", "largest matmul reaches"))
    for dtype, peak in device.peak:
        peaks.add_row(dtype, show(peak, FLOP_PER_SECOND), words.percent(device.matmul.points[-1][1]))
    links = table(("<", "link"), (">", "joins"), (">", "bandwidth"), (">", "latency"), ("<", "source"))
    for link in profile.links:
        joins = words.count(link.span) if link.span else "any"
        numbers = show(link.bandwidth, BYTE_PER_SECOND), words.seconds(link.latency)
        links.add_row(Text(words.clean(link.name)), joins, *numbers, Text("\n".join(_lines(link.source))))
    return Group(*lines, peaks, Text(""), links)


def _lines(source: str) -> list[str]:
    """A source names its numbers one a line."""
    return [words.clean(line) for line in source.splitlines()]
