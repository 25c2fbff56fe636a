"""The parallel model equals the single one: loss, every gradient, every parameter after three AdamW steps, in float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from autoplan.apply import apply
from autoplan.apply.checkpoint import gathered
from autoplan.plan import needs_fsdp
from autoplan.strategy import Mesh
from tests.apply.models import FACTORIES, batches, double, gpt_loss, loss_of
from tests.apply.plans import PLANNERS
from tests.apply.ranks import run

pytestmark = pytest.mark.gloo

TOLERANCE = {"llama": 1e-10, "gpt": 1e-10, "translator": 1e-10, "hf_llama": 2e-6}
"""Relative. Hugging Face computes norms and the loss in float32, whatever the model's format."""
CLIP = 0.5

CASES = {
    2: {
        "replicate": {"mesh": Mesh(dp_replicate=2)},
        "replicate, accumulation": {"mesh": Mesh(dp_replicate=2), "micro_batch": 1},
        "fsdp, accumulation": {"mesh": Mesh(dp_shard=2), "micro_batch": 2},
        "fsdp, zero-2, recompute": {"mesh": Mesh(dp_shard=2), "zero": 2, "recompute": "full"},
        "tp": {"mesh": Mesh(tp=2)},
        "tp, sequence": {"mesh": Mesh(tp=2), "sequence": True},
        "tp, sequence, recompute, accumulation": {"mesh": Mesh(tp=2), "sequence": True, "recompute": "full", "micro_batch": 4},
    },
    4: {
        "hsdp": {"mesh": Mesh(dp_replicate=2, dp_shard=2)},
        "hsdp, accumulation": {"mesh": Mesh(dp_replicate=2, dp_shard=2), "micro_batch": 1},
        "tp x fsdp, sequence, recompute": {"mesh": Mesh(dp_shard=2, tp=2), "sequence": True, "recompute": "full"},
        "tp x replicate, accumulation": {"mesh": Mesh(dp_replicate=2, tp=2), "micro_batch": 2},
    },
}


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-6, weight_decay=0.1)


@cache
def reference(name):
    torch.manual_seed(3)
    model = double(name)()
    opt, losses, gradients = optimizer(model.parameters()), [], {}
    for batch in batches(name):
        loss = loss_of(name, model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {key: p.grad.clone() for key, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        opt.step()
        opt.zero_grad()
    return losses, gradients, {key: value.clone() for key, value in model.state_dict().items()}


def share(batch, rank, size):
    return {key: value.chunk(size)[rank] for key, value in batch.items()}


def plan_of(name, options):
    return PLANNERS[name](**options)


def compare(expected, found):
    """The largest relative error, and where it is."""
    scale = max(value.abs().max().item() for value in expected.values() if value.numel())
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    errors = {key: (found[key] - value).abs().max().item() / scale for key, value in expected.items()}
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def one(name, options):
    plan = plan_of(name, options)
    losses, gradients, parameters = reference(name)
    tolerance = TOLERANCE[name]
    inputs = {key: value[: plan.micro_batch] for key, value in next(iter(batches(name))).items()}
    parallel = apply(double(name), plan, device="cpu", seed=3, loss_fn=gpt_loss if name == "gpt" else None, inputs=inputs)
    if plan.pipeline is None:  # where FSDP has nothing to do there is none
        assert isinstance(parallel.module, FSDPModule) == needs_fsdp(plan.mesh, plan.workload) == bool(parallel.units())
    opt = optimizer(parallel.parameters())
    found = {}
    for step, batch in enumerate(batches(name)):
        loss = parallel.step(share(batch, parallel.dp_rank, parallel.dp_size))
        assert abs(loss.item() - losses[step]) < tolerance * 10, (step, loss.item(), losses[step])
        if not found:
            found = gathered(parallel, {key: p.grad for key, p in parallel.module.named_parameters()})
        parallel.clip_grad_norm_(CLIP)
        opt.step()
        opt.zero_grad()
    error, where = compare(gradients, found)
    assert error < tolerance, f"gradient of {where}: {error:.1e}"
    state = parallel.full_state_dict()
    error, where = compare(parameters, state)
    assert error < tolerance, f"parameter {where}: {error:.1e}"


def all_cases(name, world):
    import traceback

    failures = []
    for title, options in CASES[world].items():
        try:
            one(name, options)
        except Exception:
            failures.append(f"{title}: {traceback.format_exc()}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("world", list(CASES))
@pytest.mark.parametrize("name", list(FACTORIES))
def test_parity(name, world):
    reference(name)
    run(world, all_cases, name, world)
