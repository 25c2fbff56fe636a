"""What goes wrong in a launch: a rank that ends, a launch of another size, an end in the middle of a save. Real processes, joined
by environment variables as torchrun, Slurm or a shell script set them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from autoplan.apply import apply, lifeline
from autoplan.cli.talk import fail
from autoplan.errors import AutoplanError
from autoplan.strategy import Mesh
from tests.apply.models import batches, double, gpt_loss
from tests.apply.plans import gpt

pytestmark = pytest.mark.gloo

Ended = dict[int, tuple[int, str]]
"""(exit status, stderr) by rank."""


def launch(world: int, folder: Path, function: Callable[..., Any], *args: Any, within: float = 60.0) -> Ended:
    """Fork `world` processes as a launcher would; wait for all, and for none longer than `within` seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [_start(rank, world, port, folder, function, args) for rank in range(world)]
    end, statuses = time.monotonic() + within, {}
    while len(statuses) < world and time.monotonic() < end:
        for rank, pid in enumerate(pids):
            if rank not in statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[rank] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.02)
    for rank in set(range(world)) - set(statuses):
        os.kill(pids[rank], signal.SIGKILL)
        os.waitpid(pids[rank], 0)
    assert len(statuses) == world, f"ranks {sorted(set(range(world)) - set(statuses))} hang"
    return {rank: (statuses[rank], (folder / f"stderr{rank}").read_text()) for rank in range(world)}


def _start(rank: int, world: int, port: int, folder: Path, function: Callable[..., Any], args: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(os.open(folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo"
        )
        torch.set_num_threads(1)
        lifeline.SILENCE, lifeline.GRACE, lifeline.PERIOD = 2.0, 1.0, 0.2
        function(*args)
        status = 0
    except AutoplanError as error:
        fail("error", str(error))
        status = error.exit_code
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def build(mesh: Mesh) -> tuple[Any, torch.optim.Optimizer]:
    parallel = apply(double("gpt"), gpt(mesh, micro_batch=2), device="cpu", loss_fn=gpt_loss, inputs=batches("gpt")[0])
    return parallel, torch.optim.AdamW(parallel.parameters(), lr=1e-2)


def train(parallel: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    parallel.step({key: value.chunk(parallel.dp_size)[parallel.dp_rank] for key, value in batch.items()})
    optimizer.step()
    optimizer.zero_grad()


def end_in_a_step(mesh: Mesh, rank: int, end: Callable[[], None]) -> None:
    parallel, optimizer = build(mesh)
    train(parallel, optimizer, batches("gpt")[0])
    if dist.get_rank() == rank:
        parallel.module.h[1].mlp.register_forward_hook(lambda *_: end())
    train(parallel, optimizer, batches("gpt")[1])


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fails() -> None:
    time.sleep(0.5)
    raise MemoryError("no memory is left")


@pytest.mark.parametrize(("mesh", "rank"), [(Mesh(pp=2, dp_shard=2), 3), (Mesh(dp_shard=2, tp=2), 0)], ids=["pipeline", "rank 0"])
def test_a_rank_that_is_killed_ends_all(mesh: Mesh, rank: int, tmp_path: Path) -> None:
    ended = launch(4, tmp_path, end_in_a_step, mesh, rank, killed)
    assert ended.pop(rank)[0] == -signal.SIGKILL
    for status, told in ended.values():
        assert status == 3, told
        assert f"rank {rank}" in told
        assert "in the middle of a step" in told


def test_a_rank_that_fails_tells_why(tmp_path: Path) -> None:
    ended = launch(4, tmp_path, end_in_a_step, Mesh(pp=2, tp=2), 2, fails)
    assert "MemoryError" in ended.pop(2)[1]
    for status, told in ended.values():
        assert status == 3, told
        assert "rank 2 failed in a step: MemoryError: no memory is left." in told


def test_a_launch_of_another_size_is_refused_on_every_rank(tmp_path: Path) -> None:
    for status, told in launch(2, tmp_path, build, Mesh(dp_shard=2, tp=2)).values():
        assert status == 2
        assert "the plan wants 4 devices (dp_shard 2 x tp 2)" in told


def killed_in_a_save(folder: Path) -> None:
    parallel, optimizer = build(Mesh(dp_shard=2))
    train(parallel, optimizer, batches("gpt")[0])
    parallel.save(folder, optimizer, step=1)
    before = parallel.full_state_dict()
    if dist.get_rank() == 0:
        torch.save(before, folder.with_name("expected"))
    train(parallel, optimizer, batches("gpt")[1])
    if dist.get_rank() == 1:
        dcp.FileSystemWriter.write_data = lambda *_: killed()  # its plan is made, its data is not written
    parallel.save(folder, optimizer, step=2)


def load_again(folder: Path) -> None:
    parallel, optimizer = build(Mesh(dp_shard=2))
    assert parallel.load(folder, optimizer) == 1
    expected = torch.load(folder.with_name("expected"))
    for name, value in parallel.full_state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_killed_in_a_save_the_checkpoint_before_it_loads(tmp_path: Path) -> None:
    ended = launch(2, tmp_path, killed_in_a_save, tmp_path / "checkpoint")
    assert ended[1][0] == -signal.SIGKILL
    assert ended[0][0] == 3, ended[0][1]
    assert "in the middle of saving a checkpoint" in ended[0][1]
    assert [status for status, _ in launch(2, tmp_path, load_again, tmp_path / "checkpoint").values()] == [0, 0]
