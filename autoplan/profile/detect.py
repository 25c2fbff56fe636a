"""What this machine has: GPU model, memory, links between GPUs; and the profile that fits. No torch in here.

`nvidia-smi` is asked, which every driver brings, and its output is parsed.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autoplan.errors import UsageError
from autoplan.hardware import HardwareProfile
from autoplan.units import BYTE, Bytes, show

CPU_HARDWARE = "cpu-gloo"
"""The profile of a machine without GPUs."""

Interconnect = Literal["NVLink", "PCIe", "none"]
Ask = Callable[[Sequence[str]], str | None]
"""Runs a program; what it prints, or None when it cannot be run."""

_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
_TOPOLOGY = ("nvidia-smi", "topo", "-m")
_MIB = 2.0**20
_ALIKE = 0.15
"""How far the memory of a card may be from a profile's: drivers keep some for themselves."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs of one machine."""

    model: str
    count: int
    memory: Bytes
    interconnect: Interconnect

    def __str__(self) -> str:
        joined = f", {self.interconnect}" if self.count > 1 else ""
        return f"{self.count} x {self.model} of {show(self.memory, BYTE)}{joined}"


@dataclass(frozen=True, slots=True)
class Choice:
    """A profile and why it was chosen, in one clause."""

    name: str
    reason: str


def run(command: Sequence[str]) -> str | None:
    """What a program prints; None when it isn't there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def gpus(ask: Ask = run) -> Gpus | None:
    """The GPUs of this machine; None without any. Raises `UsageError` when they are of several models."""
    listed = ask(_QUERY)
    rows = re.findall(r"^\s*(\S.*?)\s*,\s*(\d+)(?:\s*MiB)?\s*$", listed or "", re.MULTILINE)
    if not rows:
        return None
    models = sorted({name for name, _ in rows})
    if len(models) > 1:
        raise UsageError(
            f"this machine has GPUs of several models: {', '.join(models)}.",
            "Plan for one of them: CUDA_VISIBLE_DEVICES, and --hardware with its profile.",
        )
    memory = min(float(size) for _, size in rows) * _MIB
    return Gpus(models[0], len(rows), memory, _interconnect(ask(_TOPOLOGY) if len(rows) > 1 else None, len(rows)))


def _interconnect(matrix: str | None, count: int) -> Interconnect:
    """NVLink only when every pair of GPUs has it: the matrix of `nvidia-smi topo -m` says NV18 there, and PIX, NODE, SYS ... for
    ways over PCIe."""
    if count < 2:
        return "none"
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", matrix or "").splitlines()]
    rows = [words[1 : count + 1] for words in lines if words and re.fullmatch(r"GPU\d+", words[0]) and words[1:2] != ["GPU1"]]
    cells = [cell for row in rows if "X" in row for cell in row if cell != "X"]
    return "NVLink" if cells and all(re.fullmatch(r"NV\d+", cell) for cell in cells) else "PCIe"


def choose(found: Gpus | None, profiles: Sequence[HardwareProfile]) -> Choice:
    """The profile of the same model with the same memory and links. Raises `UsageError`, with the nearest, when there is none."""
    if found is None:
        return Choice(CPU_HARDWARE, "no GPU was found here, so this is the profile of a CPU")
    alike = [p for p in profiles if _model(found.model) & _model(p.device.name) and _fits(found, p)]
    if not alike:
        near = [p.name for p in profiles if _model(found.model) & _model(p.device.name)]
        hint = f"; or take what is near: --hardware {near[0]}" if near else ""
        raise UsageError(f"there is no profile for {found}.", f"Measure one: autoplan profile -o my.yaml{hint}.")
    words = _words(found.model)
    best = max(alike, key=lambda p: (len(words & _words(p.device.name)), -len(p.name), p.name))
    return Choice(best.name, f"found {found}")


def _fits(found: Gpus, profile: HardwareProfile) -> bool:
    linked: Interconnect = "NVLink" if re.search(r"nvlink|nvswitch", profile.links[0].name, re.IGNORECASE) else "PCIe"
    alike = abs(found.memory / profile.device.memory - 1) <= _ALIKE
    if found.count == 1 and {"PCIE", "NVL"} & _words(found.model):
        return alike and linked == "PCIe"
    return alike and found.interconnect in ("none", linked)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[A-Z0-9]+", name.upper()))


def _model(name: str) -> set[str]:
    """ "NVIDIA H100 80GB HBM3" -> {"H100"}: a letter or two and digits; of GeForce cards the number."""
    return {word for word in _words(name) if re.fullmatch(r"[A-Z]{1,2}\d{1,4}[A-Z]?|\d{2}[5-9]0", word)}


def processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "this processor"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "this processor"


def clocks(index: int, ask: Ask = run) -> str:
    """Clock and power of a GPU as it is now: "1980 MHz of 1980, 412 W of 700"; empty when nobody tells."""
    fields = "clocks.sm,clocks.max.sm,power.draw,power.limit"
    listed = ask(("nvidia-smi", "-i", str(index), f"--query-gpu={fields}", "--format=csv,noheader,nounits"))
    values = [value.strip() for value in (listed or "").split(",")]
    if len(values) != 4 or not all(re.fullmatch(r"[\d.]+", value) for value in values):
        return ""
    clock, most, power, limit = (f"{float(value):.0f}" for value in values)
    return f"{clock} MHz of {most}, {power} W of {limit}"
