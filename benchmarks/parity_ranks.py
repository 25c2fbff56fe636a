"""The ranks of the parity matrix: forked once for a model and a number of processes, they work through its plans; when one
fails, its companions are ended and new ones go on with the next plan."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from autoplan.apply import apply
from autoplan.apply.checkpoint import gathered
from autoplan.apply.loss import loss_of
from autoplan.capture import LoadedModel
from autoplan.plan import Plan
from autoplan.verify.parity import widened as wide_grouped_mm
from tests.test_parity import Result, optimizer

STEPS, SEED = 3, 3
PATIENCE = 300.0
"""Seconds for one plan."""


@dataclass(frozen=True)
class Cell:
    """A model under a kind of plan: refused, failed, or how far it is from one process."""

    model: str
    plan: str
    refused: str = ""
    """Why the planner proposes no such plan."""
    failed: str = ""
    error: float = 0.0
    where: str = ""
    seconds: float = 0.0


def in_float64() -> None:
    """Models bring norms, rotations, scores and the loss to float32; here everything is to stay in float64."""
    to, as_type, softmax = torch.Tensor.to, torch.Tensor.type, F.softmax

    def wide(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_floating_point(self) and self.dtype == torch.float64:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return to(self, *args, **kwargs)

    def wide_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self if self.dtype == torch.float64 and args == (torch.float32,) else as_type(self, *args, **kwargs)

    def wide_softmax(input: torch.Tensor, *args: Any, dtype: Any = None, **kwargs: Any) -> torch.Tensor:
        return softmax(input, *args, dtype=None if input.dtype == torch.float64 else dtype, **kwargs)

    torch.Tensor.to = wide  # type: ignore[method-assign,assignment]
    torch.Tensor.type = wide_type  # type: ignore[method-assign]
    torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else to(self, torch.float32)  # type: ignore
    F.softmax = torch.nn.functional.softmax = wide_softmax  # type: ignore[assignment]
    F.grouped_mm = wide_grouped_mm(F.grouped_mm)


def build(loaded: LoadedModel) -> torch.nn.Module:
    return loaded.build().double().eval()


def batches(loaded: LoadedModel, samples: int) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    found = [loaded.example_inputs(samples) for _ in range(STEPS)]
    return [{key: widened(value) for key, value in batch.items()} for batch in found]


def widened(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def reference(loaded: LoadedModel, samples: int) -> Result:
    torch.manual_seed(SEED)
    model = build(loaded)
    opt, losses, gradients = optimizer(model.parameters()), [], {}
    for batch in batches(loaded, samples):
        loss = loss_of(model, batch, batch, loaded.loss_fn, None)
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        }
        opt.step()
        opt.zero_grad()
    return losses, gradients, {key: value.clone() for key, value in model.state_dict().items()}


def trained(loaded: LoadedModel, plan: Plan) -> Result:
    inputs = lambda samples: {key: widened(value) for key, value in loaded.example_inputs(samples).items()}  # noqa: E731
    parallel = apply(lambda: build(loaded), plan, device="cpu", seed=SEED, loss_fn=loaded.loss_fn, inputs=inputs)
    opt, losses, gradients = optimizer(parallel.parameters()), [], {}
    for batch in batches(loaded, plan.workload.global_batch):
        share = {
            key: value.chunk(parallel.dp_size)[parallel.dp_rank] if isinstance(value, torch.Tensor) and value.ndim else value
            for key, value in batch.items()
        }
        losses.append(parallel.step(share).item())
        gradients = gradients or gathered(parallel, {name: p.grad for name, p in parallel.module.named_parameters()})
        opt.step()
        opt.zero_grad()
    return losses, gradients, parallel.full_state_dict()


def apart(expected: Result, found: Result) -> tuple[float, str]:
    """The largest relative difference and where it is."""
    errors = {"the loss": max(abs(a - b) / abs(a) for a, b in zip(expected[0], found[0], strict=True))}
    for title, a, b in (("the gradient of", expected[1], found[1]), ("the parameter", expected[2], found[2])):
        if a.keys() != b.keys():
            raise AssertionError(f"{sorted(a.keys() ^ b.keys())} are not in both")
        scale = max(value.abs().max().item() for value in a.values() if value.numel())
        errors.update({f"{title} {key}": (b[key] - a[key]).abs().max().item() / scale for key in a if a[key].numel()})
    where = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    return errors[where], where


def run(model: str, loaded: LoadedModel, expected: Result, plans: dict[str, Plan], world: int) -> Iterator[Cell]:
    """The cells of a model on `world` processes, each as it finishes."""
    left = list(plans.items())
    while left:
        with tempfile.TemporaryDirectory(prefix="autoplan-parity-") as name:
            folder = Path(name)
            pids = [_fork(rank, world, folder, loaded, expected, left) for rank in range(world)]
            try:
                for title, _ in list(left):
                    cell = _await(model, title, folder, world)
                    left.pop(0)
                    yield cell
                    if cell.failed:
                        break
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)


def _await(model: str, title: str, folder: Path, world: int) -> Cell:
    start = time.monotonic()
    while time.monotonic() - start < PATIENCE:
        answers = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob(f"{_slug(title)}.rank*"))]
        failed = [answer for answer in answers if isinstance(answer, str)]
        if failed:
            time.sleep(0.5)
            answers = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob(f"{_slug(title)}.rank*"))]
            failed = sorted((a for a in answers if isinstance(a, str)), key=lambda text: "onnection closed" in text)
            return Cell(model, title, failed=failed[0])
        if len(answers) == world:
            error, where, seconds = max(answers)
            return Cell(model, title, error=error, where=where, seconds=seconds)
        time.sleep(0.02)
    return Cell(model, title, failed=f"it takes longer than {PATIENCE:.0f} s")


def _fork(rank: int, world: int, folder: Path, loaded: LoadedModel, expected: Result, plans: list[tuple[str, Plan]]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
        timeout = timedelta(seconds=PATIENCE)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
        for title, plan in plans:
            _answer(folder, title, rank, _measure(loaded, plan, expected))
        time.sleep(PATIENCE)  # the parent ends all at once
    finally:
        os._exit(0)


def _measure(loaded: LoadedModel, plan: Plan, expected: Result) -> tuple[float, str, float] | str:
    start = time.perf_counter()
    try:
        error, where = apart(expected, trained(loaded, plan))
    except Exception as error:
        if os.environ.get("AUTOPLAN_TRACEBACK"):
            traceback.print_exc()
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return error, where, time.perf_counter() - start


def _answer(folder: Path, title: str, rank: int, what: Any) -> None:
    draft = folder / f".{rank}"
    draft.write_bytes(pickle.dumps(what))
    draft.rename(folder / f"{_slug(title)}.rank{rank}")


def _slug(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title)
