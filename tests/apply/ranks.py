"""Real processes that talk through gloo: `run(world, function, *args)` returns what each rank's function returned."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankError(AssertionError):
    """The first error of a rank, with its traceback."""


def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = 400.0) -> list[Any]:
    """Fork `world` processes, join them in a process group, call `function(*args)` in each."""
    with tempfile.TemporaryDirectory(prefix="autoplan-ranks-") as folder:
        pids = [_start(rank, world, Path(folder), function, args) for rank in range(world)]
        try:
            _wait(pids, Path(folder), time.monotonic() + timeout)
        finally:
            for pid in pids:
                _kill(pid)
        return [_result(Path(folder) / f"rank{rank}") for rank in range(world)]


def _start(rank: int, world: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=150)
        )
        dist.barrier()  # nobody leaves before all have come
        outcome: Any = ("ok", function(*args))
    except BaseException as error:
        outcome = ("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    (folder / f"rank{rank}.tmp").write_bytes(pickle.dumps(outcome))
    (folder / f"rank{rank}.tmp").rename(folder / f"rank{rank}")
    os._exit(0)


def _wait(pids: list[int], folder: Path, deadline: float) -> None:
    """Until all ranks are done, one has failed (the others would wait for it), or time is up."""
    while True:
        done = [folder / f"rank{rank}" for rank in range(len(pids)) if (folder / f"rank{rank}").exists()]
        for path in done:
            if pickle.loads(path.read_bytes())[0] == "error":
                time.sleep(0.3)
                errors = [message for message in map(_error, sorted(folder.glob("rank?"))) if message]
                errors.sort(key=lambda message: "Connection closed" in message or "connectFullMesh" in message)
                raise RankError(errors[0])
        if len(done) == len(pids):
            return
        if time.monotonic() > deadline:
            raise RankError(f"{len(pids) - len(done)} of {len(pids)} ranks did not finish in time")
        time.sleep(0.02)


def _error(path: Path) -> str | None:
    kind, value = pickle.loads(path.read_bytes())
    return value if kind == "error" else None


def _result(path: Path) -> Any:
    return pickle.loads(path.read_bytes())[1]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
