"""The ranks that measure or train: those of torchrun, or processes started here."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# `torch.distributed` has it, but does not export it to type checkers.
from torch._C._distributed_c10d import HashStore
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from autoplan.errors import AutoplanError, UsageError

PATIENCE = timedelta(seconds=120)
"""A rank that is silent for so long has died."""


def ranks_here() -> int:
    """Ranks that this machine has: its GPUs, else its cores up to 8, but two at least."""
    return torch.cuda.device_count() if torch.cuda.is_available() else max(2, min(8, os.cpu_count() or 2))


def start(ranks: int, function: Callable[..., None], *arguments: Any, hint: str | None = None) -> None:
    """Run `function(*arguments)` on so many processes of this machine, as torchrun would.

    Raises `UsageError`, with the `hint`, when one fails.
    """
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # the errors of ranks are told below
    with tempfile.TemporaryDirectory(prefix="autoplan-profile-") as folder:
        try:
            spawn(_on_rank, (ranks, folder, function, arguments), nprocs=ranks)
        except ProcessRaisedException as error:
            told = sorted(Path(folder).glob("error*"))
            if not told:
                raise UsageError(f"a rank failed: {_raised(str(error))}.", hint) from error
            message, _, hint = told[0].read_text(encoding="utf-8").partition("\n")
            raise UsageError(message, hint or None) from None
        except ProcessExitedException as error:
            raise UsageError(f"a rank ended before its time: {_last_line(error)}.", hint) from None


def _on_rank(rank: int, ranks: int, folder: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), AUTOPLAN_STORE=f"{folder}/store")
    _keep_stdout()
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
    _leave()


def _keep_stdout() -> None:
    """Have stdout to Python alone, where it may be JSON: in torch 2.10 gloo greets every rank there. It greets on stderr now."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(2, 1)


def _leave() -> None:
    """End this process, whose work is done, at once.

    DTensor's caches keep process groups, whose threads a dying interpreter can end by `std::terminate`.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def join(device: torch.device) -> None:
    """Join the process group of all ranks that were started, or make one of this process alone."""
    store = os.environ.get("AUTOPLAN_STORE")
    where: dict[str, Any] = {}
    if "WORLD_SIZE" not in os.environ:
        where = {"store": HashStore(), "rank": 0, "world_size": 1}
    elif store:
        where = {"init_method": f"file://{store}", "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, **where)


@contextmanager
def joined(device: torch.device, hint: str | None = None) -> Iterator[None]:
    """In a process group of all ranks that were started; a group that is there already stays.

    Raises `UsageError`, with the `hint`, when another rank is gone.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    mine = not dist.is_initialized()
    if mine:
        join(device)
    try:
        yield
    except RuntimeError as error:
        if ranks == 1:
            raise
        raise UsageError(f"one of the others ended or went silent: {_last_line(error)}.", hint) from error
    finally:
        if mine and dist.is_initialized() and (ranks == 1 or sys.exc_info()[0] is None):  # the others may be gone
            dist.destroy_process_group()


def this_device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _raised(trace: str) -> str:
    """What was raised, from a traceback: the first line after the last frame."""
    lines = trace.rpartition('\n  File "')[2].splitlines()[1:]
    return next((line for line in lines if line and not line.startswith(" ")), trace.strip()).rstrip(".")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")
