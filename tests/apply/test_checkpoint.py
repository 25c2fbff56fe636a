from __future__ import annotations

import pytest
import torch

from autoplan.apply import apply
from autoplan.errors import UsageError
from autoplan.strategy import Mesh
from tests.apply.models import batches, double, gpt_loss
from tests.apply.plans import gpt
from tests.apply.ranks import run

pytestmark = pytest.mark.gloo


def build(mesh, seed):
    plan = gpt(mesh, micro_batch=2)
    parallel = apply(double("gpt"), plan, device="cpu", seed=seed, loss_fn=gpt_loss, inputs=batches("gpt")[0])
    return parallel, torch.optim.AdamW(parallel.parameters(), lr=1e-2)


def train(parallel, optimizer, batch):
    share = {key: value.chunk(parallel.dp_size)[parallel.dp_rank] for key, value in batch.items()}
    loss = parallel.step(share)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def same(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


FIRST = Mesh(dp_shard=2, tp=2)
OTHERS = (Mesh(dp_shard=4), Mesh(dp_replicate=2, tp=2), FIRST, Mesh(tp=4), Mesh(pp=2, tp=2))
STAGED = Mesh(pp=2, tp=2)


def save_and_load(folder, saved_under, others):
    first, second, third = batches("gpt")
    parallel, optimizer = build(saved_under, seed=0)
    train(parallel, optimizer, first)
    parallel.save(folder / "step", optimizer, step=1)
    train(parallel, optimizer, second)
    optimizer.param_groups[0]["lr"] = 3e-3  # as a scheduler does
    parallel.save(folder / "step", optimizer, step=2)
    saved = parallel.full_state_dict()
    expected = train(parallel, optimizer, third)
    after = parallel.full_state_dict()
    assert sorted(path.name for path in folder.iterdir()) == ["step"]
    for mesh in others:
        other, its = build(mesh, seed=5)
        assert other.load(folder / "step", its) == 2
        same(saved, other.full_state_dict())
        assert abs(train(other, its, third) - expected) < 1e-12
        for key, value in other.full_state_dict().items():
            assert (value - after[key]).abs().max() < 1e-12, (mesh, key)
    with pytest.raises(UsageError, match="holds no checkpoint"):
        parallel.load(folder / "nothing")


def test_any_plan_loads_what_another_saved(tmp_path):
    run(4, save_and_load, tmp_path, FIRST, OTHERS)


def test_a_checkpoint_leaves_a_pipeline(tmp_path):
    run(4, save_and_load, tmp_path, STAGED, (Mesh(dp_shard=4), STAGED, Mesh(pp=2, dp_shard=2)))
