"""What `apply` accepts and refuses, on one process where possible."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from autoplan.apply import apply
from autoplan.apply.check import parameter_shards
from autoplan.apply.checkpoint import full, gathered
from autoplan.apply.shards import Coordinate, ParameterShards
from autoplan.errors import UsageError
from autoplan.strategy import GATHERED, REPLICATE, Border, Mesh, Sharding, shard
from tests.apply.models import GPT, Llama, Translator, batches, double, gpt_loss, loss_of
from tests.apply.plans import gpt, llama, make, translator
from tests.apply.ranks import run


def wrong_world():
    with pytest.raises(UsageError, match=r"the plan wants 8 devices \(dp_shard 4 x tp 2\), torchrun started 2"):
        apply(Llama, llama(Mesh(dp_shard=4, tp=2)), device="cpu")


@pytest.mark.gloo
def test_wrong_world_size():
    run(2, wrong_world)


def test_wrong_module():
    with pytest.raises(UsageError, match=r"names the module 'layers\.0', which the model doesn't have"):
        parameter_shards(GPT(), llama(Mesh(tp=2)))


def test_wrong_parameter_and_dim():
    plan = llama(Mesh(tp=2))
    model = Llama()
    model.layers[1].feed_forward.w2 = nn.Linear(63, 32, bias=False)
    with pytest.raises(
        UsageError, match=r"dim 1 of parameter 'layers\.1\.feed_forward\.w2\.weight' \[32, 63\] can't be cut into 2"
    ):
        parameter_shards(model, plan)
    del model.layers[0].attention.wq
    with pytest.raises(UsageError, match=r"'layers\.0\.attention\.wq\.weight', which the model doesn't have"):
        parameter_shards(model, plan)


def test_packed_weight_and_dp_shard():
    with pytest.raises(UsageError, match=r"dim 1 of packed parameter 'transformer.*isn't divisible by dp_shard 5"):
        parameter_shards(Translator(), translator(Mesh(dp_shard=5, tp=2), batch=5))


def test_tied_parameters_share_a_layout():
    shards = parameter_shards(GPT(), gpt(Mesh(tp=2)))
    assert shards["wte.weight"].layout == shards["lm_head.weight"].layout == shard(0)


@pytest.mark.parametrize("layout", [REPLICATE, GATHERED, shard(0), shard(1), shard(0, blocks=3)])
@pytest.mark.parametrize("fsdp_dim", [0, 1])
def test_pieces_tile_the_tensor(layout, fsdp_dim):
    shards = ParameterShards((12, 8), layout, fsdp_dim)
    full = torch.arange(96.0).view(12, 8)
    seen = torch.zeros_like(full)
    for tp in range(2):
        for dp in range(5):
            for piece in shards.pieces(Coordinate(tp, 2, dp, 5)):
                piece.of_full(seen).add_(1)
                assert 0 not in piece.sizes
    assert (seen == (1 if layout.sharded else 2)).all()


def one_device():
    plan = llama(Mesh())
    torch.manual_seed(3)
    reference = double("llama")()
    module = double("llama")()
    module.load_state_dict(reference.state_dict())
    parallel = apply(module, plan, device="cpu")
    assert parallel.module is module
    assert isinstance(module, Llama)
    assert list(module.state_dict()) == list(reference.state_dict())
    batch = batches("llama")[0]
    expected = loss_of("llama", reference, batch)
    assert parallel.step(batch).item() == pytest.approx(expected.item(), rel=1e-12)
    expected.backward()
    for (key, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad.full_tensor() - q.grad).abs().max() < 1e-12, key


@pytest.mark.gloo
def test_one_device_and_a_built_module():
    run(1, one_device)


def built_module():
    torch.manual_seed(3)
    module = double("gpt")()
    expected = {key: value.clone() for key, value in module.state_dict().items()}
    parallel = apply(module, gpt(Mesh(dp_shard=2, tp=2)), device="cpu")
    for key, value in parallel.full_state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert parallel.module.wte.weight is parallel.module.lm_head.weight
    held = sum(p.to_local().numel() for p in parallel.parameters())
    assert held < 0.32 * sum(p.numel() for p in parallel.parameters())  # a quarter, and norms and biases that tp doesn't cut


@pytest.mark.gloo
def test_every_rank_keeps_its_part_of_a_built_module():
    run(4, built_module)


def mixed_precision():
    plan = gpt(Mesh(dp_shard=2, tp=2), dtype="float32", compute="bfloat16", sequence=True)
    parallel = apply(GPT, plan, device="cpu", loss_fn=gpt_loss)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=3e-3)
    batch = {key: value.chunk(2)[parallel.dp_rank] for key, value in batches("gpt")[0].items()}
    losses = []
    for _ in range(20):
        losses.append(parallel.step(batch).item())
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in parallel.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.gloo
def test_bfloat16_with_float32_master_weights_learns():
    losses = run(4, mixed_precision)[0]
    assert losses[-1] < losses[0] - 0.5


def dropout(recompute):
    plan = gpt(Mesh(dp_replicate=2, tp=2), recompute=recompute, sequence=True)
    parallel = apply(lambda: GPT(dropout=0.2).double(), plan, device="cpu", loss_fn=gpt_loss, seed=4)
    batch = {key: value.chunk(2)[parallel.dp_rank] for key, value in batches("gpt")[0].items()}
    loss = parallel.step(batch).item()
    return loss, gathered(parallel, {key: value.grad for key, value in parallel.module.named_parameters()})


@pytest.mark.gloo
def test_dropout_repeats_in_recomputation_and_agrees_within_a_group():
    plain, again = run(4, dropout, "none"), run(4, dropout, "full")
    assert len({loss for loss, _ in plain}) == 1
    for key, gradient in plain[0][1].items():
        for _, gradients in (*plain, *again):
            assert (gradients[key] - gradient).abs().max() < 1e-12, key


def misfit():
    module = GPT()
    with pytest.raises(UsageError, match="which the model doesn't have"):
        apply(module, llama(Mesh(tp=2)), device="cpu")
    assert not any(parameter.is_meta for parameter in module.parameters())
    with pytest.raises(UsageError, match="is on the meta device"), torch.device("meta"):
        apply(GPT(), gpt(Mesh(tp=2)), device="cpu")


@pytest.mark.gloo
def test_a_refused_module_keeps_its_weights():
    run(2, misfit)


def missing_leaf():
    plan = llama(Mesh(tp=2))
    name, outer = plan.strategies[0]
    border = Border("norm", "in", "hidden", REPLICATE, GATHERED)
    outer = replace(outer, sharding=replace(outer.sharding, borders=(*outer.sharding.borders, border)))
    parallel = apply(double("llama"), replace(plan, strategies=((name, outer), *plan.strategies[1:])), device="cpu")
    with pytest.raises(UsageError, match="'hidden' of module 'norm', but 'norm' is not called with it"):
        parallel.step(batches("llama")[0])
    with pytest.raises(UsageError, match="the plan runs 8 samples on each dp rank"):
        parallel.step({key: value[:3] for key, value in batches("llama")[0].items()})


@pytest.mark.gloo
def test_calls_that_the_plan_does_not_know():
    run(2, missing_leaf)


def evaluation():
    parallel = apply(double("translator"), translator(Mesh(tp=2)), device="cpu", seed=3)
    modes = []
    parallel.module.head.register_forward_hook(lambda module, *_: modes.append(module.training))
    evaluated = parallel.evaluate(batches("translator")[0]).item()
    assert modes == [False]
    assert parallel.module.head.training
    parallel.module.eval()
    with torch.no_grad():
        assert parallel(**batches("translator")[0]).item() == evaluated
    return evaluated


@pytest.mark.gloo
def test_evaluation_without_gradients():
    torch.manual_seed(3)
    reference = double("translator")().eval()
    with torch.no_grad():
        expected = reference(**batches("translator")[0]).item()
    assert run(2, evaluation)[0] == pytest.approx(expected, rel=1e-12)


class Packed(nn.Module):
    """A packed projection whose parts are taken apart in unusual ways."""

    def __init__(self, way):
        super().__init__()
        self.way, self.proj, self.out = way, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        y = self.proj(x)
        if self.way == "view":
            a, b, c = y.view(*x.shape[:2], 3, 2, 4).unbind(2)
            y = (a * b + c).flatten(2)
        elif self.way == "unflatten":
            a, b, c = y.unflatten(-1, (3, 8)).unbind(-2)
            y = a * b + c
        elif self.way == "slices":
            y = y[..., :8] * y[..., 8:16] + y[:, :, 16:]
        elif self.way == "pointwise first":
            a, b, c = (y * 2 + 1).chunk(3, -1)
            y = a * b + c
        elif self.way == "one row":
            y = y[..., :8] * y[:, :1, 8:16].squeeze(1)[:, None] + y[:, 0, 16:].unsqueeze(1)
        elif self.way == "along the parts":
            y = y.log_softmax(-1)[..., 3:11] * y.flip(-1)[..., 2:10] + (y + torch.arange(24))[..., 16:]
        else:
            y = y[..., ::3] * y[..., 1::3] + y.softmax(-1)[..., 4:12]
        return self.out(y).square().mean()


WAYS = ("view", "unflatten", "slices", "pointwise first", "one row", "along the parts", "anything")


def packed_ways(references):
    layers = Sharding(parameters=(("proj.weight", shard(0, blocks=3)), ("proj.bias", GATHERED), ("out.weight", shard(1))))
    for way, (state, x, loss, gradients) in zip(WAYS, references, strict=True):
        module = Packed(way).double()
        module.load_state_dict(state)
        parallel = apply(module, make({}, layers, Mesh(tp=2), batch=len(x)), device="cpu")
        assert parallel.step({"x": x}).item() == pytest.approx(loss, rel=1e-12), way
        for key, parameter in module.named_parameters():
            assert (full(parallel, key, parameter.grad) - gradients[key]).abs().max() < 1e-12, (way, key)


@pytest.mark.gloo
def test_packed_parts_however_they_are_taken():
    references = []
    for way in WAYS:
        model, x = Packed(way).double(), torch.randn(2, 3, 8, dtype=torch.float64)
        loss = model(x)
        loss.backward()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        references.append((state, x, loss.item(), {key: p.grad for key, p in model.named_parameters()}))
    run(2, packed_ways, references)
