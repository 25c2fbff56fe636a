"""Measure this machine: what every rank runs, and how ranks are started when torchrun has not."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from autoplan.errors import AutoplanError, UsageError
from autoplan.files.measurements import SideFile
from autoplan.hardware import HardwareProfile
from autoplan.measurement import Measurement
from autoplan.profile.fitted import Residual, fitted, residuals
from autoplan.profile.session import Tell, measured
from autoplan.profile.suite import suite
from autoplan.profile.torch_bench import TorchBench
from autoplan.units import Seconds

DTYPES = {"cuda": ("bfloat16", "float16", "float32"), "cpu": ("float32", "bfloat16", "float16", "float64")}
"""What is measured when nothing is said: curves in the first, of the others the peak."""
PATIENCE = timedelta(seconds=120)
"""A rank that is silent for so long has died."""
_AGAIN = "Start the same command again: what was measured so far is kept."


@dataclass(frozen=True)
class Measured:
    """A profile with what it was fitted to."""

    profile: HardwareProfile
    measurements: tuple[Measurement, ...]
    residuals: tuple[Residual, ...]


def ranks_here() -> int:
    """Ranks that a profile of this machine needs: its GPUs, else its cores up to 8, but two at least."""
    return torch.cuda.device_count() if torch.cuda.is_available() else max(2, min(8, os.cpu_count() or 2))


def measure(
    output: Path, budget: Seconds, dtypes: Sequence[str] = (), borrowed: HardwareProfile | None = None, tell: Tell | None = None
) -> Measured:
    """The profile of this machine, called `output`'s stem; every rank calls this and gets the same. In about `budget` seconds.

    Measurements are kept beside `output` as soon as they are there, and found again by the next run; `finished` forgets them.
    Raises `UsageError` when the machine is too busy or another rank has died.
    """
    device = _device()
    with _joined(device):
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
        profile = fitted(found, bench.machine, output.stem, date.today().isoformat(), borrowed)
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


def start(ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(*arguments)` on so many processes of this machine, as torchrun would. Raises `UsageError` when one fails."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # the errors of ranks are told below
    with tempfile.TemporaryDirectory(prefix="autoplan-profile-") as folder:
        try:
            spawn(_on_rank, (ranks, folder, function, arguments), nprocs=ranks)
        except ProcessRaisedException as error:
            told = sorted(Path(folder).glob("error*"))
            if not told:
                raise UsageError(f"a rank failed: {_last_line(error)}.", _AGAIN) from error
            message, _, hint = told[0].read_text(encoding="utf-8").partition("\n")
            raise UsageError(message, hint or None) from None
        except ProcessExitedException as error:
            raise UsageError(f"a rank ended before its time: {_last_line(error)}.", _AGAIN) from None


def _on_rank(rank: int, ranks: int, folder: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), AUTOPLAN_STORE=f"{folder}/store")
    if sys.platform == "linux":  # all of them are here, and a host's own name need not be known
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        function(*arguments)
    except AutoplanError as error:
        late = "others" in error.message  # who tells of another rank's death knows less than that rank
        (Path(folder) / f"error{int(late)}{rank:05}").write_text(f"{error.message}\n{error.hint or ''}", encoding="utf-8")
        raise
    except KeyboardInterrupt:
        os._exit(130)


@contextmanager
def _joined(device: torch.device) -> Iterator[None]:
    """In a process group of all ranks that were started; a group that is there already stays."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    mine = ranks > 1 and not dist.is_initialized()
    if mine:
        store = os.environ.get("AUTOPLAN_STORE")
        where: dict[str, Any] = {"init_method": f"file://{store}", "rank": int(os.environ["RANK"]), "world_size": ranks}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, **(where if store else {}))
    try:
        yield
    except RuntimeError as error:
        if ranks == 1:
            raise
        raise UsageError(f"one of the others ended or went silent: {_last_line(error)}.", _AGAIN) from error
    finally:
        if mine and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")


def _ignore(_: object) -> None:
    return None
