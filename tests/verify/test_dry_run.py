"""Dry runs: plans of the four examples send and hold what they say, and plans that were tampered with are found out."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

import autoplan
from autoplan.apply import apply
from autoplan.cli import main
from autoplan.cost.model import CostModel
from autoplan.graph import Graph
from autoplan.plan import Plan
from autoplan.strategy import AXES, Mesh, Strategy, Zero
from autoplan.verify import DryRun, dry_run
from autoplan.verify._torch import FakeTensorMode, Peak, TorchDispatchMode
from autoplan.verify.traffic import axis_of, coordinates
from autoplan.workload import DType
from tests.test_parity import CASES, EXAMPLES, PIPELINES, SEQUENCE, Case, load, plan_of

BATCH = 16
"""Of steps with many micro-batches."""
MIXED = Case(Mesh(pp=2, dp_replicate=2, dp_shard=2, tp=2), 1, SEQUENCE, "full", 3)
PAST = Case(Mesh(pp=2, dp_shard=2), 1, schedule="interleaved-1f1b", chunks=2)
"""An encoder-decoder sends the embedded target past the encoder: FSDP must not gather the encoder's last layer for it."""
ZERO = Case(Mesh(dp_shard=2, tp=2), 2, SEQUENCE, "none", 1)
SELECTIVE = {
    "selective, tp + sp x fsdp": Case(Mesh(dp_shard=2, tp=2), 2, SEQUENCE, "selective"),
    "selective, tp, pp": Case(Mesh(pp=2, tp=2), 2, recompute="selective", zero=1, schedule="interleaved-1f1b", chunks=2),
    "selective, cp x fsdp": Case(Mesh(dp_shard=2, cp=2), 2, recompute="selective", zero=2),
    "selective, cp x tp + sp": Case(Mesh(cp=2, tp=2), 4, SEQUENCE, "selective"),
    "cp x tp x fsdp": Case(Mesh(dp_shard=2, cp=2, tp=2), 2),
}
RING = {
    "ring": Case(Mesh(cp=4, cp_kind="ring"), 4),
    "ring, recompute": Case(Mesh(dp_shard=2, cp=2, cp_kind="ring"), 2, recompute="full", zero=1),
    "ring, selective": Case(Mesh(cp=2, cp_kind="ring"), 4, recompute="selective"),
}
SPLIT = {
    "zero-bubble, deep": Case(Mesh(pp=4), 1, schedule="zero-bubble"),
    "zero-bubble, tp + sp, zero 1": Case(Mesh(pp=2, dp_shard=2, tp=2), 1, SEQUENCE, zero=1, schedule="zero-bubble"),
}
WHAT: dict[str, dict[str, Case]] = {
    "llama": {
        name: {**CASES[2], **CASES[4]}[name] for name in ("fsdp, accumulation, recompute", "zero 1, accumulation", "tp + sp x dp")
    }
    | {"deep": PIPELINES[4]["deep, fewer micro-batches"], "mixed": MIXED, "zero 1, tp + sp": ZERO}
    | SELECTIVE
    | SPLIT
    | RING,
    "gpt": {
        name: {**CASES[2], **CASES[4]}[name]
        for name in ("dp only", "zero 2, accumulation", "tp + sp x fsdp, recompute", "cp x fsdp")
    }
    | {name: PIPELINES[4][name] for name in ("zero 1, interleaved", "tp", "cp")}
    | SELECTIVE
    | RING,
    "hf_llama": {name: {**CASES[2], **CASES[4]}[name] for name in ("hsdp, zero 1, recompute", "cp x dp")}
    | {name: PIPELINES[4][name] for name in ("zero 2, gpipe, recompute",)}
    | {
        "selective, cp": Case(Mesh(cp=2), 2, recompute="selective"),
        "zero-bubble, tp + sp": Case(Mesh(pp=2, tp=2), 2, SEQUENCE, schedule="zero-bubble"),
        "pp, cp x tp + sp, recompute": Case(Mesh(pp=2, cp=2, tp=2), 2, SEQUENCE, "full"),
    },
    "transformer": {name: {**CASES[2], **CASES[4]}[name] for name in ("tp + sp, recompute",)}
    | {
        "tp + sp, interleaved, recompute": PIPELINES[4]["tp + sp, interleaved, recompute"],
        "past the encoder": PAST,
        "cp": Case(Mesh(cp=2), 2, recompute="full"),
        "selective, cp": Case(Mesh(cp=2), 2, recompute="selective"),
        "selective, tp + sp": Case(Mesh(tp=2), 2, SEQUENCE, "selective"),
    },
}


@cache
def graph(name: str, deep: bool, compute: DType) -> Graph:
    return autoplan.inspect(load(name, deep), compute_dtype=compute)


def priced(name: str, case: Case, compute: DType = "bfloat16") -> Plan:
    plan = plan_of(name, case)
    workload = replace(plan.workload, param_dtype="float32", compute_dtype=compute, reduce_dtype="float32")
    return again(name, replace(plan, hardware="cpu-gloo", workload=workload))


def again(name: str, plan: Plan) -> Plan:
    """The plan with a prediction of its own."""
    hardware = autoplan.load_hardware(plan.hardware)
    costs = CostModel(graph(name, plan.mesh.pp > 1, plan.workload.compute_dtype), hardware, plan.workload)
    return replace(plan, prediction=costs.predict_plan(plan))


def run(name: str, plan: Plan) -> DryRun:
    deep = plan.mesh.pp > 1
    return dry_run(plan, load(name, deep), graph(name, deep, plan.workload.compute_dtype))


@pytest.mark.parametrize(("name", "title"), [(name, title) for name, cases in WHAT.items() for title in cases])
def test_a_plan_does_what_it_says(name: str, title: str) -> None:
    plan = priced(name, WHAT[name][title])
    found = run(name, plan)
    assert found.agrees, "\n".join(found.differences)
    assert {row.rank for row in found.rows} == set(range(plan.mesh.pp))
    used = {axis for axis in AXES if getattr(plan.mesh, axis) > 1}
    assert {axis for row in found.rows for axis in row.axis.split("+")} == used
    for memory in found.memory:
        assert memory.measured <= memory.predicted <= 1.6 * memory.measured  # in models so small bounds weigh much


def test_logits_that_the_model_still_holds_are_counted() -> None:
    """With a large vocabulary over tp the loss's forward pass holds most: logits, the same in float32, and their softmax."""
    sizes = "size=125M&layers=2&hidden=64&heads=4&kv_heads=4&ffn=128&vocab=16384&seq_len=512"
    loaded = autoplan.load_model(f"{EXAMPLES / 'llama.py'}?{sizes}")
    known = autoplan.inspect(loaded)
    plan = autoplan.plan(known, gpus=2, fixed={"tp": 2}, hardware="cpu-gloo", global_batch=1)
    assert plan.outer_strategy.sharding.layout("head.weight").sharded
    (memory,) = dry_run(plan, loaded, known).memory
    assert memory.measured <= memory.predicted <= 1.1 * memory.measured


def changed(plan: Plan, zero: Zero) -> Plan:
    strategies = tuple((name, replace(strategy, zero=zero)) for name, strategy in plan.strategies)
    return replace(plan, strategies=strategies)


def test_a_strategy_that_was_changed_after_the_prediction_is_told() -> None:
    plan = priced("gpt", CASES[2]["fsdp, accumulation, recompute"], "float32")
    found = run("gpt", changed(plan, 1))
    assert not found.agrees
    assert any("was it edited?" in sentence for sentence in found.differences)
    assert all(row.agrees for row in found.rows), "it runs as it is written now"


def test_what_runs_otherwise_than_planned_is_counted() -> None:
    """The plan that runs is another one than the plan that is compared."""
    from autoplan.verify import dry

    plan = priced("gpt", CASES[2]["fsdp, accumulation, recompute"], "float32")
    seen = dry.one_rank(changed(plan, 2), load("gpt"), 0)
    costs = CostModel(graph("gpt", False, "float32"), autoplan.load_hardware("cpu-gloo"), plan.workload)
    found = dry.compare(plan, costs, {0: seen})
    assert "dp_shard: 6 all_gather ran, the plan says 12." in found.differences


def test_a_border_that_was_removed_is_told() -> None:
    plan = priced("llama", CASES[2]["tp"], "float32")

    def without(strategy: Strategy) -> Strategy:
        borders = tuple(border for border in strategy.sharding.borders if border.side == "in")
        return replace(strategy, sharding=replace(strategy.sharding, borders=borders))

    layers = {run.strategy for run in plan.runs}
    strategies = tuple((name, without(s) if name in layers else s) for name, s in plan.strategies)
    found = run("llama", replace(plan, strategies=strategies))
    assert any("breaks a rule of sharding" in sentence for sentence in found.differences)


def test_what_is_too_large_is_not_passed_over_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer looks at a value, which fake tensors don't have: real ones have it, where there is room for them."""
    from autoplan.verify import dry

    plan, loaded, known = priced("gpt", CASES[2]["dp only"]), load("gpt"), graph("gpt", False, "bfloat16")

    def build() -> Any:
        module = loaded.build()
        module.h[0].register_forward_hook(lambda layer, args, output: None if output.sum().isfinite() else output)
        return module

    looking = replace(loaded, build=build)
    assert dry.dry_run(plan, looking, known).agrees
    monkeypatch.setattr(dry, "SMALL", 0.0)
    found = dry.dry_run(plan, looking, known)
    assert not found.memory
    assert "too much to be run here" in found.notes[0]


def test_too_little_memory_is_told() -> None:
    plan = priced("gpt", CASES[2]["dp only"], "float32")
    memory = replace(plan.prediction.memory, parameters=0.0, activations=0.0)
    found = run("gpt", replace(plan, prediction=replace(plan.prediction, memory=memory)))
    assert any(sentence.startswith("memory: the peak is") for sentence in found.differences)


def test_shapes_that_dtensor_works_out_are_not_memory() -> None:
    """AdamW asks for the shapes of whole matrices of the vocabulary, of which a rank holds an eighth: three times 41 MB."""
    sizes = {"layers": 2, "hidden": 256, "heads": 8, "kv_heads": 8, "ffn": 256, "vocab": 40_000, "seq_len": 8, "size": "125M"}
    load: dict[str, Any] = {"compute_dtype": "float32", "global_batch": 1, "model_kwargs": sizes}
    plan = autoplan.plan(str(EXAMPLES / "llama.py"), gpus=8, fixed={"dp_replicate": 1, "dp_shard": 1, "tp": 8}, **load)
    memory = plan.prediction.memory
    found = dry_run(plan, autoplan.load_model(plan.model))
    assert found.agrees, found.differences
    states = memory.parameters + memory.gradients + memory.awaited + memory.optimizer
    assert states < found.memory[0].measured < 1.5 * states


class Theirs(MemTracker):
    """`MemTracker` without statistics of modules, whose hooks keep alive what nobody needs and forbid accumulation."""

    def __enter__(self) -> Theirs:
        self._fake_mode_on_entry = torch._guards.active_fake_mode()
        self._track_resize()
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore_resize()
        TorchDispatchMode.__exit__(self, *error)


def test_the_peak_is_that_of_memtracker() -> None:
    """On fake tensors, with FSDP, which resizes storages, in steps of several micro-batches."""
    from autoplan.verify import dry

    plan, loaded = priced("gpt", CASES[2]["zero 2, accumulation"]), load("gpt")
    found = []
    for theirs in (False, True):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with dry.alone(0, 2):
            parallel = apply(loaded.build, plan, device="cpu", loss_fn=loaded.loss_fn, allocating=mode)
            with mode:
                optimizer = torch.optim.AdamW(parallel.parameters())
                tracker = Theirs() if theirs else Peak()
                held = [*parallel.module.parameters(), *parallel.module.buffers()]
                tracker.track_external(*held) if isinstance(tracker, Theirs) else tracker.track(*held)
                batch = loaded.example_inputs(plan.micro_batch * plan.micro_batches)
                with tracker:
                    for _ in range(2):
                        parallel.run(batch, plan.micro_batches)
                        optimizer.step()
                        optimizer.zero_grad()
        if isinstance(tracker, Theirs):
            found.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
        else:
            found.append(tracker.most)
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("width", [8, 4])
def test_attention_keeps_no_scores(width: int) -> None:
    """Of values as wide as queries and of narrower ones, DeepSeek's: as GPUs do."""
    from autoplan.verify.kernels import as_on_gpus

    query, key = (torch.ones(1, 2, 64, 8, requires_grad=True) for _ in range(2))
    value = torch.ones(1, 2, 64, width, requires_grad=True)
    tracker = Peak()
    tracker.track(query, key, value)
    before = tracker.held
    with as_on_gpus(), tracker:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out.sum().backward()
    assert out.shape == (1, 2, 64, width)
    assert [tensor.grad.shape for tensor in (query, key, value)] == [query.shape, key.shape, value.shape]  # type: ignore[union-attr]
    assert tracker.most - before < 4 * 2 * 64 * 64, "less than one tensor of scores"


def test_groups_have_axes() -> None:
    mesh = Mesh(pp=2, dp_replicate=2, dp_shard=2, tp=2)
    assert coordinates(13, mesh) == {"pp": 1, "dp_replicate": 1, "dp_shard": 0, "cp": 0, "tp": 1}
    assert [axis_of(ranks, mesh) for ranks in ((0, 1), (1, 3), (4, 0), (5, 13), (0, 1, 2, 3))] == [
        "tp", "dp_shard", "dp_replicate", "pp", "dp_shard+tp",
    ]  # fmt: skip


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"{EXAMPLES}/gpt.py?size=124M&layers=2&hidden=32&heads=4&vocab=64&seq_len=16"
    file = tmp_path / "plan.yaml"
    asked = ["--gpus", "4", "--hardware", "cpu-gloo", "--report", str(tmp_path / "report.html"), "-o", str(file)]
    assert main(["plan", model, *asked]) == 0
    assert main(["verify", str(file)]) == 0
    assert "does what it says" in capsys.readouterr().out
    file.write_text(
        file.read_text().replace("zero: 1", "zero: 3").replace("zero: 2", "zero: 3").replace("recompute: none", "recompute: full")
    )
    assert main(["verify", str(file), model, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["differences"]
    assert main(["verify", str(file), str(EXAMPLES / "llama.py")]) == 2


@pytest.mark.parametrize(
    ("case", "fewer"),
    [
        (Case(Mesh(pp=2, dp_shard=2), 1, zero=1), (1, 3)),
        (Case(Mesh(pp=2, dp_shard=2), 1, schedule="interleaved-1f1b", chunks=2, recompute="full"), (2, 6)),
        (Case(Mesh(pp=2, dp_shard=2), 1, schedule="gpipe"), (1, 8)),
        (Case(Mesh(pp=2, dp_shard=2), 1, schedule="zero-bubble"), (2, 3)),
        (Case(Mesh(pp=2, tp=2), 1, SEQUENCE, zero=2), (1, 3)),
        (Case(Mesh(dp_shard=4), 1, recompute="full"), (1, 2)),
        (Case(Mesh(dp_shard=2, tp=2), 1, SEQUENCE, zero=1), (1, 2)),
        (Case(Mesh(dp_shard=2, tp=2), 1, SEQUENCE, "full", zero=2), (1, 2)),
        (Case(Mesh(pp=2, dp_shard=2, tp=2), 1, SEQUENCE, zero=1), (2, 3)),
    ],
    ids=["1f1b", "interleaved", "gpipe", "zero-bubble", "tp", "fsdp", "accumulation", "zero 2", "accumulation in a pipeline"],
)
def test_a_few_micro_batches_show_what_many_do(case: Case, fewer: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from autoplan.verify import dry, steady

    plan, loaded = priced("gpt", case), load("gpt", case.mesh.pp > 1)
    plan = replace(plan, workload=replace(plan.workload, global_batch=BATCH))
    assert steady.sample_of(plan, 0).counts == fewer
    said = steady.told({steady.sample_of(plan, 0)})
    if fewer[1] == plan.micro_batches:
        assert said == ""
    elif case.mesh.pp == 1:
        assert said == f"a step of {fewer[1]} micro-batches was run; what {plan.micro_batches} send follows from it"
    else:
        assert (
            said == f"steps of {fewer[0]} and {fewer[1]} micro-batches were run; what {plan.micro_batches} send follows from them"
        )
    sent, held = dry.one_rank(plan, loaded, 0)
    monkeypatch.setattr(dry, "sample_of", lambda plan, rank: steady.Sample((BATCH // plan.mesh.dp,) * 2, BATCH // plan.mesh.dp))
    all_sent, all_held = dry.one_rank(plan, loaded, 0)
    assert sent == all_sent
    assert abs(all_held - held) <= 128 * plan.micro_batches  # a few scalars of each: its loss
