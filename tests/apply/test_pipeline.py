"""Pipelines: models that send more than one stream, what is refused, what each rank holds."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoplan.apply import apply
from autoplan.apply.check import check_pipeline
from autoplan.apply.checkpoint import gathered
from autoplan.errors import UsageError
from autoplan.plan import Pipeline
from autoplan.strategy import UNSHARDED, Mesh
from tests.apply.models import HIDDEN, SEQ, VOCAB, GPTBlock, batches, double, gpt_loss
from tests.apply.plans import gpt, make
from tests.apply.ranks import run
from tests.apply.test_parity import CLIP, compare, optimizer, share

LAYERS = 4


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, dropout_rate=0.0,
        use_cache=False, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).double()


T5_LAYERS = [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)]


def t5_inputs(samples):
    generator = torch.Generator().manual_seed(samples)
    draw = {name: torch.randint(1, VOCAB, (samples, SEQ), generator=generator) for name in ("input_ids", "labels")}
    draw["attention_mask"] = torch.ones(samples, SEQ, dtype=torch.int64)
    draw["attention_mask"][:, SEQ // 2 :] = 0
    return draw


class Skips(GPTBlock):
    """A block that returns more than its stream, and passes on what it is given of what is made before all layers."""

    def forward(self, x, early, *, scale):
        y = super().forward(x) * scale
        return y + 0.1 * early, {"mean": y.mean(-1, keepdim=True), "early": early}


class Weird(nn.Module):
    """Embeddings kept for the end, writes in place, random numbers, a buffer, a frozen parameter, a layer's side output."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.position = nn.Parameter(torch.randn(SEQ, HIDDEN))
        self.frozen = nn.Parameter(torch.full((HIDDEN,), 0.5), requires_grad=False)
        self.blocks = nn.ModuleList(Skips(0.0) for _ in range(LAYERS))
        self.unused = nn.Linear(3, 3)
        self.register_buffer("scales", torch.linspace(0.5, 1.5, LAYERS))

    def forward(self, idx):
        kept = self.embed(idx)
        x = kept + self.position[: idx.shape[1]]
        x += self.frozen
        weights = torch.ones(idx.shape, dtype=x.dtype, device=x.device)
        weights[:, 0] = x.sigmoid().mean(-1)[:, 0]
        total, early = 0, kept
        for scale, block in zip(self.scales, self.blocks, strict=True):
            x, extra = block(x, early, scale=scale)
            early = extra["early"]
            total = total + extra["mean"].square().mean()
            x[:, :2] *= 0.5
        logits = F.linear(x * weights[..., None], self.embed.weight) + kept.mean()
        return logits, total


def weird():
    return Weird().double()


def weird_loss(output, batch):
    logits, total = output
    return F.cross_entropy(logits.flatten(0, 1), batch["idx"].roll(-1, 1).flatten()) + total


def weird_inputs(samples):
    generator = torch.Generator().manual_seed(samples)
    return {"idx": torch.randint(0, VOCAB, (samples, SEQ), generator=generator)}


SPECIAL = {
    "t5": (t5, T5_LAYERS, t5_inputs, None),
    "weird": (weird, [f"blocks.{i}" for i in range(LAYERS)], weird_inputs, weird_loss),
}
MESHES = {
    2: {"1f1b": (Mesh(pp=2), "1f1b", 1, 3), "interleaved": (Mesh(pp=2), "interleaved-1f1b", 2, 3)},
    4: {
        "deep": (Mesh(pp=4), "1f1b", 1, 3),
        "zero 1": (Mesh(pp=2, dp_shard=2), "1f1b", 1, 1),
        "split": (Mesh(pp=2, dp_shard=2), "zero-bubble", 1, 3),
    },
}


def reference(name):
    factory, _, inputs, loss_fn = SPECIAL[name]
    torch.manual_seed(3)
    model = factory()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    opt, losses, gradients = optimizer(model.parameters()), [], {}
    for _ in range(3):
        output = model(**inputs(8))
        loss = loss_fn(output, inputs(8)) if loss_fn else output.loss
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {
            k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in model.named_parameters()
        }
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        opt.step()
        opt.zero_grad()
    return start, losses, gradients, model.state_dict()


def special(name, world):
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # T5's position bias; nobody writes into it
    factory, layers, inputs, loss_fn = SPECIAL[name]
    start, losses, gradients, parameters = reference(name)
    for title, (mesh, schedule, chunks, zero) in MESHES[world].items():
        plan = make(dict.fromkeys(layers, UNSHARDED), UNSHARDED, mesh, micro_batch=2, schedule=schedule, chunks=chunks, zero=zero)
        parallel = apply(factory, plan, device="cpu", seed=3, loss_fn=loss_fn, inputs=inputs)
        for key, value in parallel.full_state_dict().items():
            assert torch.equal(value, start[key]), (title, key)
        opt, found = optimizer(parallel.parameters()), {}
        for expected in losses:
            mine = share(inputs(8), parallel.dp_rank, parallel.dp_size)
            assert abs(parallel.evaluate(mine).item() - expected) < 1e-9, (title, expected)  # nothing is dropped in training
            loss = parallel.step(mine)
            assert abs(loss.item() - expected) < 1e-9, (title, loss.item(), expected)
            found = found or gathered(parallel, {key: p.grad for key, p in parallel.module.named_parameters()})
            parallel.clip_grad_norm_(CLIP)
            opt.step()
            opt.zero_grad()
        for expected, have in ((gradients, found), (parameters, parallel.full_state_dict())):
            error, where = compare(expected, have)
            assert error < 1e-10, (title, where, error)


@pytest.mark.gloo
@pytest.mark.parametrize("world", list(MESHES))
@pytest.mark.parametrize("name", list(SPECIAL))
def test_models_that_send_much(name, world):
    run(world, special, name, world)


def four_blocks(mesh=None, **options):
    """A plan for `Chain`."""
    return make({f"blocks.{i}": UNSHARDED for i in range(LAYERS)}, UNSHARDED, mesh or Mesh(pp=2), **options)


class Chain(nn.Module):
    """Linears; `between` is what happens to the stream in the middle of them."""

    def __init__(self, between=None, order=range(LAYERS)):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(LAYERS))
        self.between, self.order = between, order

    def forward(self, x):
        for i in self.order:
            x = self.blocks[i](x)
            if i == 1 and self.between is not None:
                x = self.between(x)
        return x.square().mean()


class Unseen(Chain):
    """Hands a layer a tensor behind its back."""

    def __init__(self):
        super().__init__()
        self.blocks[3].register_forward_pre_hook(lambda module, args: (args[0] + Unseen.seen,))

    def forward(self, x):
        Unseen.seen = self.blocks[0].weight.mean() + x
        return super().forward(x)


def chain_inputs(samples):
    return {"x": torch.randn(samples, 8)}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (four_blocks(Mesh(pp=3), batch=9, cuts=(1,)), "cuts the layers into 2 stages, where pp 3 with 1 chunk a rank needs 3"),
        (replace(four_blocks(), pipeline=None), "has pp 2 and no pipeline"),
        (replace(four_blocks(Mesh()), pipeline=Pipeline(split_before=("blocks.1",))), "has pp 1 and a pipeline"),
        (replace(four_blocks(), pipeline=Pipeline(split_before=("blocks.9",))), "splits before 'blocks.9', which is no layer"),
        (four_blocks(chunks=2), "1f1b has one chunk of layers a stage, not 2"),
        (four_blocks(micro_batch=8, schedule="interleaved-1f1b", chunks=2), r"needs micro-batches \(1\) in multiples of its 2"),
    ],
)
def test_pipelines_that_are_none(plan, message):
    with pytest.raises(UsageError, match=message):
        check_pipeline(plan)


def refused():
    plan = four_blocks(dtype="float32", micro_batch=2)

    def refuses(match, factory, **options):
        with pytest.raises(UsageError, match=match):
            apply(factory, plan, device="cpu", **{"inputs": chain_inputs, **options})

    refuses("needs to know what the model is called with", Chain, inputs=None)
    refuses(
        r"reads the value of a tensor outside its layers, with item in .*test_pipeline\.py:",
        lambda: Chain(lambda x: x * x.sum().item()),
    )
    refuses(r"reads the value .* with __bool__ in", lambda: Chain(lambda x: x if (x > 0).all() else -x))
    refuses("layer 'blocks.1' is called twice", lambda: Chain(order=(0, 1, 1, 2, 3)))
    refuses("doesn't call layer 'blocks.2'", lambda: Chain(order=(0, 1, 3)))
    refuses("calls 'blocks.1' of stage 0 after 'blocks.2' of stage 1", lambda: Chain(order=(0, 2, 1, 3)))
    refuses("a tensor reaches layer 'blocks.3' that is no argument", Unseen)
    parallel = apply(Chain, plan, device="cpu", inputs=chain_inputs)
    with pytest.raises(UsageError, match="cut into pipeline stages can't be called"):
        parallel(**chain_inputs(2))
    with pytest.raises(UsageError, match="the plan runs 8 samples on each dp rank"):
        parallel.step(chain_inputs(3))


@pytest.mark.gloo
def test_what_a_pipeline_refuses():
    run(2, refused)


def failing():
    armed = []

    def fails(x):
        if armed:
            raise ZeroDivisionError("in the user's code")
        return x

    parallel = apply(lambda: Chain(fails), four_blocks(dtype="float32", micro_batch=2), device="cpu", inputs=chain_inputs)
    parallel.step(chain_inputs(8))
    armed.append(True)  # between the stages: the second one's code
    error = ZeroDivisionError if parallel._pipeline.rank else RuntimeError  # which is how the first one hears of it
    with pytest.raises(error):
        parallel.step(chain_inputs(8))


@pytest.mark.gloo
def test_an_error_of_the_model_is_the_one_that_is_told():
    run(2, failing)


def holds():
    plan = gpt(Mesh(pp=2), micro_batch=1, schedule="1f1b")
    parallel = apply(double("gpt"), plan, device="cpu", seed=3, loss_fn=gpt_loss, inputs=batches("gpt")[0])
    rank = parallel._pipeline.rank
    own = {name for name, p in parallel.module.named_parameters(remove_duplicate=False) if not p.is_meta}
    tied, ends = {"wte.weight", "lm_head.weight"}, ({"wpe.weight"}, {"ln_f.weight", "ln_f.bias"})
    assert own == {name for name, _ in parallel.module.named_parameters() if name.startswith(f"h.{rank}.")} | tied | ends[rank]
    assert parallel.module.wte.weight is parallel.module.lm_head.weight
    loss = parallel.step(batches("gpt")[0])
    other = {key: value.roll(1, 0)[:, : SEQ // 2] for key, value in batches("gpt")[0].items()}
    assert parallel.step(other) != loss  # other shapes: traced anew
    for schedule, _ in parallel._pipeline._schedules.values():
        stage = schedule._stage
        infos = [info for each in (stage.args_recv_info, stage.grad_recv_info) for some in each.values() for info in some]
        assert infos
        assert all(info.buffer.is_meta for info in infos)
    return loss.item()


@pytest.mark.gloo
def test_a_rank_holds_its_stages_alone_and_no_buffers_between_steps():
    first, second = run(2, holds)
    assert first == second


def mixed_precision(schedule, zero):
    plan = gpt(Mesh(pp=2, dp_shard=2), dtype="float32", compute="bfloat16", micro_batch=1, zero=zero, schedule=schedule)
    parallel = apply(double("gpt"), plan, device="cpu", loss_fn=gpt_loss, inputs=batches("gpt")[0])
    opt = torch.optim.AdamW(parallel.parameters(), lr=3e-3)
    batch, losses = share(batches("gpt")[0], parallel.dp_rank, 2), []
    for _ in range(20):
        losses.append(parallel.step(batch).item())
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in parallel.parameters())
        opt.step()
        opt.zero_grad()
    assert {wire.dtype for wire in parallel._pipeline.program.wires} == {torch.bfloat16}
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.gloo
@pytest.mark.parametrize(("schedule", "zero"), [("1f1b", 1), ("zero-bubble", 3)])
def test_bfloat16_in_a_pipeline_learns(schedule, zero):
    run(4, mixed_precision, schedule, zero)
