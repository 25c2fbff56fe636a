"""Measure this machine: what every rank runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autoplan.errors import UsageError
from autoplan.files.measurements import SideFile
from autoplan.hardware import HardwareProfile
from autoplan.measurement import Measurement
from autoplan.profile.fitted import Residual, fitted, residuals
from autoplan.profile.ranks import joined, this_device
from autoplan.profile.session import Tell, measured
from autoplan.profile.suite import suite
from autoplan.profile.torch_bench import TorchBench
from autoplan.units import Seconds

DTYPES = {"cuda": ("bfloat16", "float16", "float32"), "cpu": ("float32", "bfloat16", "float16", "float64")}
"""What is measured when nothing is said: curves in the first, of the others the peak."""
AGAIN = "Start the same command again: what was measured so far is kept."


@dataclass(frozen=True)
class Measured:
    """A profile with what it was fitted to."""

    profile: HardwareProfile
    measurements: tuple[Measurement, ...]
    residuals: tuple[Residual, ...]


def measure(
    output: Path, budget: Seconds, dtypes: Sequence[str] = (), borrowed: HardwareProfile | None = None, tell: Tell | None = None
) -> Measured:
    """The profile of this machine, called `output`'s stem; every rank calls this and gets the same. In about `budget` seconds.

    Measurements are kept beside `output` as soon as they are there, and found again by the next run; `finished` forgets them.
    Raises `UsageError` when the machine is too busy or another rank has died.
    """
    device = this_device()
    with joined(device, AGAIN):
        bench = TorchBench(device)
        names = tuple(dtypes) or DTYPES[device.type]
        if bench.ranks == 1 and borrowed is None:
            raise UsageError("one device alone has no links to measure.", "Say whose they are: --links h100-sxm-8x.")
        side = SideFile(output, _facts(bench, names))
        known: list[Any] = [None]
        if bench.rank == 0:
            known = [side.read()]
            side.start(known[0])
        if bench.ranks > 1:
            dist.broadcast_object_list(known, src=0)
        first = bench.rank == 0
        todo = suite(bench.machine, names)
        found = measured(bench, todo, budget, known[0], side.add if first else _ignore, tell if first and tell else _ignore)
        profile = fitted(found, bench.settled(), output.stem, date.today().isoformat(), borrowed)
        return Measured(profile, tuple(found), tuple(residuals(profile, found)))


def finished(output: Path) -> None:
    """The profile is written: there is nothing to go on with."""
    SideFile(output, {}).remove()


def _facts(bench: TorchBench, dtypes: Sequence[str]) -> dict[str, str]:
    """Measurements belong together when these are equal."""
    machine = bench.machine
    hosts = ", ".join(dict.fromkeys(machine.hosts))
    facts = {"device": machine.device, "ranks": str(machine.ranks), "hosts": hosts, "torch": torch.__version__}
    return {**facts, "dtypes": ", ".join(dtypes)}


def _ignore(_: object) -> None:
    return None
