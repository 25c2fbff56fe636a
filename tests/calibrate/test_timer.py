"""`autoplan.Timer` on real steps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import autoplan
from autoplan.calibrate.phases import union, within, without
from autoplan.errors import UsageError
from autoplan.files.measurements import load_steps
from tests.apply.ranks import run


def test_steps_after_the_warm_up_are_timed(tmp_path: Path) -> None:
    with autoplan.Timer(tmp_path / "steps.json", warmup=2) as timer:
        for i in range(5):
            with timer.step():
                time.sleep(0.2 if i < 2 else 0.02)
    found = load_steps(tmp_path / "steps.json")
    assert len(found.seconds) == 3
    assert 0.02 <= found.step_time < 0.15
    assert found.ranks == 1
    assert found.peak_memory is not None
    assert found.peak_memory > 50e6


def test_a_callback_ticks(tmp_path: Path) -> None:
    timer = autoplan.Timer(tmp_path / "steps.json", warmup=1)
    for _ in range(4):
        time.sleep(0.01)
        timer.tick()
    timer.write()
    assert len(load_steps(tmp_path / "steps.json").seconds) == 2


def test_a_traced_step_tells_its_phases(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))
    optimizer = torch.optim.AdamW(model.parameters())
    with autoplan.Timer(tmp_path / "steps.json", warmup=1, trace=True) as timer:
        for _ in range(4):
            with timer.step():
                model(torch.rand(256, 256)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    found = load_steps(tmp_path / "steps.json")
    assert len(found.seconds) == 2
    phases = found.phases
    assert phases.communication == 0
    assert min(phases.forward, phases.backward) > 0
    assert phases.optimizer > 0


def test_nothing_to_write(tmp_path: Path) -> None:
    timer = autoplan.Timer(tmp_path / "s.json")
    for _ in range(3):
        with timer.step():
            pass
    with pytest.raises(UsageError, match="no step was timed after a warm-up of 3"):
        timer.write()
    with pytest.raises(UsageError, match="there is no folder"):
        autoplan.Timer(tmp_path / "nowhere" / "s.json")
    assert not list(tmp_path.iterdir())


def one_rank(path: Path) -> None:
    rank = torch.distributed.get_rank()
    with autoplan.Timer(path, warmup=0) as timer:
        for slow in (0, 1):
            with timer.step():
                time.sleep(0.1 if rank == slow else 0.0)


@pytest.mark.gloo
def test_the_slowest_rank_counts(tmp_path: Path) -> None:
    run(2, one_rank, tmp_path / "steps.json")
    found = load_steps(tmp_path / "steps.json")
    assert found.ranks == 2
    assert min(found.seconds) >= 0.1


def test_times_are_cut_and_joined() -> None:
    assert union([(3, 4), (0, 1), (0.5, 2), (2, 2)]) == [(0, 2), (3, 4)]
    assert within([(0, 2), (3, 6)], [(1, 4), (5, 9)]) == [(1, 2), (3, 4), (5, 6)]
    assert without([(0, 2), (3, 6)], [(1, 4), (5, 5.5)]) == [(0, 1), (4, 5), (5.5, 6)]
