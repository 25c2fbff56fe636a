"""`examples/train.py` under torchrun: learns, is killed, goes on under another plan with the same losses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import autoplan

ROOT = Path(__file__).parent.parent
MODEL = "examples/gpt.py?size=124M&layers=2&hidden=32&heads=4&vocab=64&seq_len=16"

STEPS = 12

pytestmark = pytest.mark.gloo


def write_plan(path: Path, **fixed: int) -> Path:
    wishes = {"global_batch": 8, "compute_dtype": "float32", "hardware": "cpu-gloo"}
    plan = autoplan.plan(str(ROOT / MODEL), gpus=4, fixed=fixed, **wishes)  # type: ignore[arg-type]
    autoplan.save_plan(plan, path)
    return path


def start(plan: Path, steps: int, checkpoint: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone"]
    command += ["examples/train.py", MODEL, str(plan), "--steps", str(steps), "--lr", "2e-2"]
    if checkpoint is not None:
        command += ["--checkpoint", str(checkpoint), "--every", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )


def losses(text: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step +(\d+) +loss ([\d.]+)", text)}


def finish(process: subprocess.Popen[str]) -> dict[int, float]:
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    return losses(text)


def kill_after(process: subprocess.Popen[str], step: int) -> dict[int, float]:
    """Read until `step` is reported, then kill every process of the run at once."""
    assert process.stdout is not None
    seen: dict[int, float] = {}
    deadline = time.monotonic() + 240
    while max(seen, default=0) < step and time.monotonic() < deadline:
        seen.update(losses(process.stdout.readline()))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return seen


def test_killed_and_resumed_under_another_plan(tmp_path: Path) -> None:
    first = write_plan(tmp_path / "first.yaml", pp=2, tp=2)
    second = write_plan(tmp_path / "second.yaml", dp_shard=4)
    whole = finish(start(first, steps=STEPS))
    assert sorted(whole) == list(range(1, STEPS + 1))
    assert whole[STEPS] < whole[1] * 0.9, "the loss falls"

    before = kill_after(start(first, steps=1000, checkpoint=tmp_path / "checkpoint"), step=3)
    assert 3 in before
    after = finish(start(second, steps=STEPS, checkpoint=tmp_path / "checkpoint"))
    assert min(after) in (3, 5, 7), "it goes on where a checkpoint was written"
    for step, loss in after.items():
        assert loss == pytest.approx(whole[step], abs=2e-4), f"step {step}"
