"""Experts dealt over ep: the parallel model equals the single one, in float64, whatever the experts' rows do."""

from __future__ import annotations

import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from autoplan.apply import apply
from autoplan.apply.checkpoint import gathered
from autoplan.apply.inventory import inventory
from autoplan.capture import load_model
from autoplan.errors import UsageError
from autoplan.strategy import Experts, Mesh, Sharding
from autoplan.verify import dry
from autoplan.verify.parity import wide_products
from autoplan.verify.traffic import Amount
from benchmarks.parity_ranks import in_float64
from tests.apply.plans import make
from tests.apply.ranks import run
from tests.models import ZOO
from tests.models.huggingface import load as load_huggingface

TOLERANCE = 1e-10
ROOT = Path(__file__).parents[2]
TINY = {"layers": 2, "hidden": 32, "heads": 4, "vocab": 64, "seq_len": 16, "ffn": 64, "experts": 8, "chosen": 2}
MODELS = {
    "example": (partial(load_model, str(ROOT / "examples/moe.py"), kwargs={**TINY, "kv_heads": 2, "size": "1B"}),
                "layers", Experts("mixture.experts", "chosen", 8)),
    "sorted": (partial(load_model, str(ROOT / "tests/models/moe.py"), kwargs={**TINY, "dense": 1}),
               "layers", Experts("feed_forward.experts", "sorted", 8)),
}  # fmt: skip
"""What loads it, where its layers are, and its experts."""
for family, number in (("mixtral", 4), ("qwen3-moe", 8)):
    title, fields, seq_len = ZOO[family].sizes["tiny"].args  # type: ignore[attr-defined]
    loading = partial(load_huggingface, title, {**fields, "num_hidden_layers": 2}, seq_len)
    MODELS[family] = loading, "model.layers", Experts("mlp.experts", "chosen", number)

CASES = {
    "example": {
        "ep, zero 1": (Mesh(dp_shard=4, ep=4), {"micro_batch": 1, "zero": 1}),
        "ep x fsdp, zero 2, recompute": (Mesh(dp_shard=4, ep=2), {"micro_batch": 1, "zero": 2, "recompute": "full"}),
        "ep x fsdp, zero 1": (Mesh(dp_shard=4, ep=2), {"micro_batch": 1, "zero": 1}),
        "ep over tp and dp_shard": (Mesh(dp_shard=2, tp=2, ep=4), {"micro_batch": 2}),
        "ep over tp, recompute": (Mesh(dp_shard=2, tp=2, ep=2), {"recompute": "full"}),
        "ep over tp, selective": (Mesh(dp_shard=2, tp=2, ep=2), {"recompute": "selective"}),
        "ep over cp and dp_shard": (Mesh(dp_shard=2, cp=2, ep=4), {}),
        "pp, recompute, zero 1": (Mesh(pp=2, dp_shard=2, ep=2), {"micro_batch": 1, "recompute": "full", "zero": 1}),
        "dp": (Mesh(dp_replicate=2, dp_shard=2, ep=2), {"micro_batch": 1}),
    },
    "sorted": {
        "ep x fsdp": (Mesh(dp_shard=4, ep=2), {}),
        "ep over tp and dp_shard": (Mesh(dp_shard=2, tp=2, ep=4), {}),
    },
    "mixtral": {"ep over tp": (Mesh(dp_shard=2, tp=2, ep=4), {})},
    "qwen3-moe": {
        "ep, recompute": (Mesh(dp_shard=4, ep=4), {"recompute": "full"}),
        "ep, selective, zero 2": (Mesh(dp_shard=4, ep=2), {"recompute": "selective", "zero": 2}),
        "pp": (Mesh(pp=2, dp_shard=2, ep=2), {}),
    },
}  # fmt: skip


def plan_of(name, mesh, batch=8, **options):
    """A plan that deals the experts and cuts nothing else over tp."""
    load, layers, experts = MODELS[name]
    model = load().build()
    shardings = {
        layer: Sharding(experts=(experts,)) if _has(module, experts.module) else Sharding()
        for layer, module in ((f"{layers}.{i}", model.get_submodule(f"{layers}.{i}")) for i in range(2))
    }
    plan = make(shardings, Sharding(), mesh, batch=batch, **options)
    return replace(plan, context=(("input_ids", 1), ("labels", 1))) if mesh.cp > 1 else plan


def _has(module, name):
    return any(inner == name for inner, _ in module.named_modules())


def build(loaded):
    return loaded.build().double().eval()


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-6, weight_decay=0.1)


def batches(loaded):
    torch.manual_seed(1)
    return [loaded.example_inputs(8) for _ in range(3)]


def reference(name):
    loaded = MODELS[name][0]()
    torch.manual_seed(3)
    model = build(loaded)
    opt, losses, gradients = optimizer(model.parameters()), [], {}
    for batch in batches(loaded):
        output = model(**batch)
        loss = output if isinstance(output, torch.Tensor) else output.loss
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {key: p.grad.clone() for key, p in model.named_parameters()}
        opt.step()
        opt.zero_grad()
    return losses, gradients, {key: value.clone() for key, value in model.state_dict().items()}


def applied(name, mesh, **options):
    loaded = MODELS[name][0]()
    plan = plan_of(name, mesh, **options)
    return apply(lambda: build(loaded), plan, device="cpu", seed=3, loss_fn=loaded.loss_fn, inputs=loaded.example_inputs)


def share(parallel, batch):
    return {key: value.chunk(parallel.dp_size)[parallel.dp_rank] for key, value in batch.items()}


def compare(name, expected, mesh, options):
    parallel = applied(name, mesh, **options)
    losses, gradients, parameters = expected
    opt, found = optimizer(parallel.parameters()), {}
    for loss, batch in zip(losses, batches(MODELS[name][0]()), strict=True):
        assert parallel.step(share(parallel, batch)).item() == pytest.approx(loss, rel=TOLERANCE)
        found = found or gathered(parallel, {key: p.grad for key, p in parallel.module.named_parameters()})
        opt.step()
        opt.zero_grad()
    for title, a, b in (("gradient", gradients, found), ("parameter", parameters, parallel.full_state_dict())):
        assert a.keys() == b.keys()
        scale = max(value.abs().max().item() for value in a.values())
        for key, value in a.items():
            error = (b[key] - value).abs().max().item() / scale
            assert error < TOLERANCE, f"{title} of {key}: {error:.1e}"


def all_cases():
    failures = []
    in_float64()
    with wide_products():
        for name, cases in CASES.items():
            expected = reference(name)
            for title, (mesh, options) in cases.items():
                try:
                    compare(name, expected, mesh, options)
                except Exception:
                    failures.append(f"{name}, {title}: {traceback.format_exc()}")
    assert not failures, "\n".join(failures)


@pytest.mark.gloo
def test_parity():
    run(4, all_cases)


class Loop(nn.Module):
    """Experts one after another, and none of them where no row is: as in transformers without grouped products."""

    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.weight = nn.Parameter(torch.randn(4, 8, 8, dtype=torch.float64))

    def forward(self, rows, choice, weights):
        out = torch.zeros_like(rows)
        for i in range(self.num_experts):
            token, place = torch.where(choice == i)
            if len(token):
                out = out.index_add(0, token, rows[token] @ self.weight[i] * weights[token, place, None])
        return out


class One(nn.Module):
    """A layer in which one expert gets all rows of all tokens."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(8, 8, dtype=torch.float64)
        self.experts = Loop()

    def forward(self, x):
        rows = self.before(x)
        choice = torch.zeros(len(rows), 1, dtype=torch.int64)
        return self.experts(rows, choice, weights=rows.sigmoid()[:, :1])


class Ones(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([One()])

    def forward(self, x):
        return self.layers[0](x).square().sum(1).mean()


def all_to_one(recompute):
    layers = {"layers.0": Sharding(experts=(Experts("experts", "chosen", 4),))}
    parallel = apply(Ones, make(layers, Sharding(), Mesh(dp_shard=2, ep=2), recompute=recompute), device="cpu", seed=5)
    x = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = parallel.step({"x": x.chunk(2)[parallel.dp_rank]})
    gradients = gathered(parallel, {name: p.grad for name, p in parallel.module.named_parameters()})
    torch.manual_seed(5)
    model = Ones()
    expected = model(x)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert parallel.module.layers[0].experts.num_experts == 4, "looks as if it had all its experts again"
    return True


def no_rows():
    return [all_to_one("none"), all_to_one("full")]


@pytest.mark.gloo
def test_a_rank_whose_experts_nobody_chooses():
    assert run(2, no_rows)[0] == [True, True]


def carried_over(folder):
    """(loss, norm of the gradient) of the second step, under the plan that made the first and under others that load it."""

    def step(parallel, opt, batch):
        loss = parallel.step(share(parallel, batch))
        norm = parallel.clip_grad_norm_(0.5)
        opt.step()
        opt.zero_grad()
        return loss.item(), norm.item()

    in_float64()
    meshes = Mesh(dp_shard=4), Mesh(dp_shard=2, tp=2, ep=4), Mesh(pp=2, dp_shard=2, ep=2)
    with wide_products():
        first, second, third = batches(MODELS["example"][0]())
        parallel = applied("example", Mesh(dp_shard=4, ep=2))
        opt = torch.optim.AdamW(parallel.parameters(), lr=1e-2, foreach=True)
        step(parallel, opt, first)
        parallel.save(folder / "checkpoint", opt, 1)
        found = [step(parallel, opt, second)]
        for mesh in meshes:
            options = {"micro_batch": 2} if mesh.pp > 1 else {}
            parallel = applied("example", mesh, **options)
            opt = torch.optim.AdamW(parallel.parameters(), lr=1e-2, foreach=True)
            assert parallel.load(folder / "checkpoint", opt) == 1
            found.append(step(parallel, opt, second))
        return found, parallel.evaluate(share(parallel, third)).item()


@pytest.mark.gloo
def test_checkpoints_clipping_and_foreach_optimizers(tmp_path):
    found, evaluated = run(4, carried_over, tmp_path)[0]
    for loss, norm in found:
        assert (loss, norm) == pytest.approx(found[0], rel=1e-10)
    assert evaluated < found[0][0] + 1


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_is_sent(recompute):
    """In a dry run, in which nobody knows how many rows there are for whom."""
    plan = plan_of("example", Mesh(dp_shard=2, tp=2, ep=4), dtype="float32", compute="bfloat16", recompute=recompute)
    loaded = MODELS["example"][0]()
    traffic, _ = dry.one_rank(plan, loaded, 1)
    rows = 4 * 16 // 2  # of the tokens of four samples this rank's part
    there_and_back = 2 * rows * 2 * 32 * 2  # two experts a row; hidden 32, of two bytes
    counts = 8 * 8
    passes, layers = 2 if recompute == "full" else 1, 2
    sent = passes * (counts + there_and_back) + there_and_back
    assert traffic["dp_shard+tp", "all_to_all"] == Amount((3 * passes + 2) * layers, sent * layers)


def test_experts_of_a_device_are_cut_over_efsdp():
    plan = plan_of("example", Mesh(dp_shard=8, ep=2), batch=16, dtype="float32")
    loaded = MODELS["example"][0]()
    with dry.alone(3, 8):
        held = inventory(apply(loaded.build, plan, device="cpu", loss_fn=loaded.loss_fn))
    found = {one.name: one.local_shape for unit in held.units for one in unit.parameters if unit.name == "layers.0"}
    assert found["mixture.experts.gate"] == (1, 32, 64)
    assert found["mixture.router.weight"] == (1, 32)


def wrong(dealt, **changes):
    layers = {f"layers.{i}": Sharding(experts=(dealt,)) for i in range(2)}
    plan = make(layers, Sharding(), Mesh(dp_shard=4, ep=4), dtype="float32")
    loaded = load_model(str(ROOT / "examples/moe.py"), kwargs={**TINY, "kv_heads": 2, "size": "1B", **changes})
    with dry.alone(0, 4), pytest.raises(UsageError) as error:
        apply(loaded.build, plan, device="cpu")
    return str(error.value)


def test_misfits_are_told():
    assert "'layers.0.moe.experts', which the model doesn't have" in wrong(Experts("moe.experts", "chosen", 8))
    assert "deals 4 experts of parameter" in wrong(Experts("mixture.experts", "chosen", 4))
    assert "can't be dealt over ep 4" in wrong(Experts("mixture.experts", "chosen", 6), experts=6)
