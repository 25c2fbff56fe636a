"""`examples/hf_trainer.py` under torchrun: a pipeline goes on with its checkpoint, `from_pretrained` reads its weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

import autoplan

ROOT = Path(__file__).parent.parent
MODEL = "examples/hf_llama.py?size=1B&layers=2&hidden=32&heads=4&kv_heads=2&ffn=64&vocab=64&seq_len=16"
STEPS = 6

pytestmark = pytest.mark.gloo


def write_plan(path: Path, **fixed: int) -> Path:
    wishes = {"global_batch": 8, "compute_dtype": "float32", "hardware": "cpu-gloo"}
    plan = autoplan.plan(str(ROOT / MODEL), gpus=2, fixed=fixed, **wishes)  # type: ignore[arg-type]
    autoplan.save_plan(plan, path)
    return path


def train(plan: Path, *options: str) -> list[float]:
    """The losses that the Trainer logs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["examples/hf_trainer.py", MODEL, str(plan), "--steps", str(STEPS), "--lr", "1e-2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr[-3000:]
    return [float(loss) for loss in re.findall(r"{'loss': '?([\d.]+)", found.stdout)]


def test_the_trainer_goes_on_under_another_plan(tmp_path: Path) -> None:
    sharded, staged = write_plan(tmp_path / "sharded.yaml", dp_shard=2), write_plan(tmp_path / "staged.yaml", pp=2)
    whole = train(sharded, "--every", "3", "--output", str(tmp_path / "out"))
    assert len(whole) == STEPS
    assert whole[-1] < whole[0] * 0.95, "the loss falls"
    checkpoint = tmp_path / "out" / "checkpoint-3"
    after = train(staged, "--resume", str(checkpoint), "--output", str(tmp_path / "other"))
    assert after == pytest.approx(whole[3:], abs=2e-3), "as if nothing had happened: parameters, moments, learning rate, samples"
    for folder in ("out", "other"):
        model = LlamaForCausalLM.from_pretrained(tmp_path / folder)
        assert sum(parameter.numel() for parameter in model.parameters()) == 22688
