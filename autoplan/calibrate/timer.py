"""`autoplan.Timer`: how long the steps of a training script take, as `autoplan calibrate` wants to know it.

    with autoplan.Timer("steps.json", plan=plan) as timer:
        for batch in batches:
            with timer.step():
                loss = parallel.step(batch)
                optimizer.step()
                optimizer.zero_grad()

Every rank has one. When it is left, the first rank writes of every step the seconds of the slowest rank, and the peak memory of
the fullest. A callback that is only called between steps uses `tick` instead of `step`.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from autoplan.calibrate.phases import phases_of
from autoplan.errors import UsageError
from autoplan.files.document import write_text
from autoplan.files.measurements import dump_steps
from autoplan.measurement import MeasuredSteps, Phases
from autoplan.plan import Plan
from autoplan.units import Seconds

_KIB = 2**10


class Timer:
    """Times steps and writes them to `path`. The first `warmup` steps are not counted.

    With `trace` one step after the warm-up runs under the PyTorch profiler, for the seconds of its phases; it is not counted
    either, for it is slower. `plan` is named in the file. An earlier file is overwritten once there is something to write.
    """

    def __init__(self, path: str | Path, *, warmup: int = 3, trace: bool = False, plan: Plan | None = None) -> None:
        self.path, self.warmup, self.plan = Path(path), warmup, plan
        self._tracing, self._phases = trace, Phases()
        self._seen = 0
        self._seconds: list[Seconds] = []
        self._last: Seconds | None = None
        if not self.path.absolute().parent.is_dir():
            raise UsageError(f"there is no folder '{self.path.parent}'.", "Make it first, or name another file.")

    def __enter__(self) -> Timer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.write()

    @contextmanager
    def step(self) -> Iterator[None]:
        """One training step, the optimizer's included."""
        if self._tracing and self._seen == self.warmup:
            with _profiler() as profiler:
                yield
                _wait()
            self._phases, self._tracing = phases_of(profiler), False
            return
        _wait()
        started = time.perf_counter()
        yield
        _wait()
        self._count(time.perf_counter() - started)

    def tick(self) -> None:
        """A step has just ended; the next one begins now."""
        _wait()
        now = time.perf_counter()
        if self._last is not None:
            self._count(now - self._last)
        self._last = now

    def _count(self, seconds: Seconds) -> None:
        self._seen += 1
        if self._seen > self.warmup:
            self._seconds.append(seconds)
        elif self._seen == self.warmup and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def measured(self) -> MeasuredSteps:
        """What was timed so far, over all ranks, which must all ask. Raises `UsageError` when that is nothing."""
        if not self._seconds:
            raise UsageError(f"no step was timed after a warm-up of {self.warmup}.", "Run more steps, or give Timer(warmup=0).")
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        phases = [seconds for _, seconds in self._phases.items()]
        told = _largest([*self._seconds, _peak()])
        mean = _largest(phases)
        about = {"torch": torch.__version__, **({"plan": str(self.plan.mesh)} if self.plan else {})}
        return MeasuredSteps(
            seconds=tuple(told[:-1]),
            ranks=ranks,
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            peak_memory=told[-1],
            phases=Phases(**dict(zip((name for name, _ in Phases().items()), mean, strict=True))),
            about=about,
        )

    def write(self) -> None:
        """Write what was timed so far; all ranks must call this."""
        found = self.measured()
        if not dist.is_initialized() or dist.get_rank() == 0:
            write_text(self.path, dump_steps(found), force=True)


def _profiler() -> Any:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities, acc_events=True)  # of the one step there is; else older torch warns


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak() -> float:
    """Bytes: of tensors on a GPU; on a CPU all that the process has ever held, PyTorch's libraries included."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB)


def _largest(values: list[float]) -> list[float]:
    """One by one, over all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    told = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return [float(value) for value in told.tolist()]
