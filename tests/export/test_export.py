"""Exports: each is pinned as a text that its target's own parser has read, means the plan's mesh and batch, and says its losses.

When a golden text changes, load it in the target before it is accepted: docs/exports.md says with which versions they were read.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoplan.errors import UsageError
from autoplan.export.exported import by_the_book, choices, wildcard
from autoplan.export.targets import TARGETS, export
from autoplan.plan import Plan
from autoplan.strategy import PARTIAL, Border, Mesh, Recompute, Sharding, Strategy, shard
from tests.report.plans import EVIL, hostile, llama, piped, single

GOLDEN = Path(__file__).parent / "golden"
PLANS = {"llama": llama, "piped": piped, "single": single}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("to", TARGETS)
def test_an_export_is_what_it_was(name: str, to: str) -> None:
    """Set AUTOPLAN_UPDATE_GOLDEN=1 to accept a new text."""
    made = export(PLANS[name](), to)
    golden = GOLDEN / f"{name}-{to}{Path(made.filename).suffix}.txt"
    if os.environ.get("AUTOPLAN_UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(made.text, encoding="utf-8")
    assert made.text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("plan", [llama(), piped(), piped("interleaved-1f1b", chunks=2), hostile()], ids=["l", "p", "i", "h"])
def test_what_is_lost_stands_in_the_text(to: str, plan: Plan) -> None:
    made = export(plan, to)
    for sentence in made.lost:
        assert sentence in (json.loads(made.text)["_autoplan"]["not_expressed"] if to == "deepspeed" else made.text)


def keywords(text: str, call: str) -> dict[str, Any]:
    """Keyword arguments of the first call of `call` in Python source."""
    found = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    node = next(node for node in found if ast.unparse(node.func).endswith(call))
    return {str(word.arg): _value(word.value) for word in node.keywords}


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


@pytest.mark.parametrize("name", PLANS)
def test_torchtitan_means_the_same(name: str) -> None:
    plan = PLANS[name]()
    words = keywords(export(plan, "torchtitan").text, "ParallelismConfig")
    assert words["data_parallel_replicate_degree"] * words["data_parallel_shard_degree"] == plan.mesh.dp
    assert (words["pipeline_parallel_degree"], words["tensor_parallel_degree"]) == (plan.mesh.pp, plan.mesh.tp)
    job = tomllib.loads(export(plan, "torchtitan-toml").text)
    local = job["training"]["local_batch_size"]
    assert job["training"]["global_batch_size"] == plan.workload.global_batch
    assert plan.workload.global_batch % (local * plan.mesh.dp) == 0
    if plan.pipeline:
        assert local == plan.micro_batch * plan.micro_batches
        assert words["pipeline_parallel_schedule"] == "1F1B"
        cut = [[name for name in stage if name.startswith("layers.")] for stage in words["module_fqns_per_model_part"]]
        assert cut == [list(stage) for stage in plan.stages]


def test_zero_bubble_is_said_or_told() -> None:
    plan = piped("zero-bubble", batch=6)
    made = export(plan, "torchtitan")
    assert keywords(made.text, "ParallelismConfig")["pipeline_parallel_schedule"] == "InterleavedZeroBubble"
    assert any("may not fit" in sentence for sentence in made.lost)
    assert not any("rounds" in sentence for sentence in made.lost)
    assert any("in each of its rounds over 2 stages" in s for s in export(piped("zero-bubble", 2, batch=7), "torchtitan").lost)
    assert any("zero-bubble: Megatron runs 1f1b" in sentence for sentence in export(plan, "megatron").lost)


def megatron(plan: Plan) -> list[str]:
    found = re.search(r"PLAN_ARGS=\((.*)\)", export(plan, "megatron").text, re.DOTALL)
    assert found
    return shlex.split(found.group(1))


def test_megatron_means_the_same() -> None:
    plan = piped("interleaved-1f1b", chunks=2)
    words = megatron(plan)
    assert words[words.index("--pipeline-model-parallel-layout") + 1] == "Et*4|t*4|t*4|t*4|t*4|t*4|t*4|t*4L"
    assert words[words.index("--recompute-num-layers") + 1] == "4"
    assert any("stages recompute from 0 to 4" in sentence for sentence in export(plan, "megatron").lost)
    assert words[words.index("--global-batch-size") + 1] == "128"
    assert "--use-megatron-fsdp" in megatron(llama())
    assert "--use-megatron-fsdp" not in megatron(at_zero(1))
    assert "--use-distributed-optimizer" in megatron(at_zero(1))


def at_zero(zero: Any) -> Plan:
    plan = llama()
    return replace(plan, strategies=tuple((name, replace(strategy, zero=zero)) for name, strategy in plan.strategies))


def test_sequences_that_are_cut_are_cut_there_or_it_is_said() -> None:
    plan = llama()
    plan = replace(plan, mesh=replace(plan.mesh, cp=plan.mesh.tp, tp=1))
    words = keywords(export(plan, "torchtitan").text, "ParallelismConfig")
    assert (words["context_parallel_degree"], words["tensor_parallel_degree"]) == (plan.mesh.cp, 1)
    assert f"--context-parallel-size {plan.mesh.cp}" in export(plan, "megatron").text
    config = yaml.safe_load(export(plan, "accelerate").text)
    assert config["parallelism_config"]["parallelism_config_cp_size"] == plan.mesh.cp
    assert config["num_processes"] == plan.mesh.size
    for to in ("deepspeed", "transformers", "lightning"):
        assert any("does not split sequences" in sentence for sentence in export(plan, to).lost)


def dealt(mesh: Mesh) -> Plan:
    return replace(llama(), mesh=mesh)


def test_experts_that_are_dealt_are_dealt_there_or_it_is_said() -> None:
    plan = dealt(Mesh(dp_shard=4, tp=2, ep=4))
    assert keywords(export(plan, "torchtitan").text, "ParallelismConfig")["expert_parallel_degree"] == 4
    assert tomllib.loads(export(plan, "torchtitan-toml").text)["parallelism"]["expert_parallel_degree"] == 4
    words = megatron(plan)
    assert words[words.index("--expert-model-parallel-size") + 1] == "4"
    assert words[words.index("--expert-tensor-parallel-size") + 1] == "1"
    text = export(plan, "transformers").text
    made: dict[str, Any] = {}
    exec(text.partition("training_arguments = ")[0], made)  # transformers checks the sizes
    assert made["distributed_config"].ep_size == 4
    assert "ep_size=4" in "".join(export(plan, "deepspeed").lost)
    for to in ("accelerate", "lightning"):
        assert any("does not deal experts" in sentence and "--ep 1" in sentence for sentence in export(plan, to).lost)
    for to in TARGETS:
        assert not any("experts" in sentence for sentence in export(llama(), to).lost)


def test_what_a_trainer_cannot_fold_is_said() -> None:
    narrow = dealt(Mesh(dp_shard=2, tp=4, ep=2))
    assert "expert_parallel_degree" not in export(narrow, "torchtitan").text
    assert any("multiple of cp x tp (4)" in sentence for sentence in export(narrow, "torchtitan").lost)
    assert "ep_size" not in keywords(export(narrow, "transformers").text, "DistributedConfig")
    assert any("multiple of tp" in sentence for sentence in export(narrow, "transformers").lost)
    over = dealt(Mesh(dp_shard=2, cp=4, ep=8))
    assert "ep_size" not in keywords(export(over, "transformers").text, "DistributedConfig")
    assert keywords(export(over, "torchtitan").text, "ParallelismConfig")["expert_parallel_degree"] == 8


def test_deepspeed_means_the_same() -> None:
    for plan in (llama(), piped(), single()):
        config = json.loads(export(plan, "deepspeed").text)
        groups = config["train_batch_size"] // config["train_micro_batch_size_per_gpu"] // config["gradient_accumulation_steps"]
        assert groups == plan.mesh.dp
    assert json.loads(export(at_zero(1), "deepspeed").text)["zero_optimization"]["stage"] == 1


def test_accelerate_means_the_same() -> None:
    config = yaml.safe_load(export(llama(), "accelerate").text)
    assert config["num_processes"] == 8
    assert config["parallelism_config"]["parallelism_config_dp_shard_size"] == 4
    assert config["parallelism_config"]["parallelism_config_tp_size"] == 2
    assert yaml.safe_load(export(single(), "accelerate").text)["distributed_type"] == "MULTI_GPU"
    assert any("plan anew with --pp 1" in sentence for sentence in export(piped(), "accelerate").lost)


def test_transformers_means_the_same() -> None:
    words = keywords(export(llama(), "transformers").text, "DistributedConfig")
    assert (words["tp_size"], words["fsdp_size"], words["pp_size"]) == (2, 4, 1)
    assert words["tp_plan"]["layers.*.attention.wq"] == "colwise"
    assert words["tp_plan"]["layers.*.attention.wo"] == "rowwise"
    assert keywords(export(piped(), "transformers").text, "DistributedConfig")["pp_size"] == 4
    wide = replace(piped(), mesh=Mesh(pp=4, dp_shard=2, tp=2))
    assert keywords(export(wide, "transformers").text, "DistributedConfig")["pp_size"] == 1


def test_lightning_means_the_same() -> None:
    text = export(llama(), "lightning").text
    words = keywords(text, "ModelParallelStrategy")
    assert (words["data_parallel_size"], words["tensor_parallel_size"]) == (4, 2)
    assert keywords(text, "Trainer")["accumulate_grad_batches"] == llama().micro_batches
    assert "strategy = 'ddp'" in export(single(), "lightning").text


@pytest.mark.parametrize("to", TARGETS)
def test_a_hostile_name_stays_a_name(to: str) -> None:
    text = export(hostile(), to).text
    if to in ("torchtitan", "transformers", "lightning"):
        tree = ast.parse(text)
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert "alert" not in calls
    assert EVIL not in text
    evil = replace(llama(), model="x\nimport os; os.abort()\u2028y", runs=(replace(llama().runs[0], layers=("'); boom()#",)),))
    made = export(evil, to).text
    assert "\nimport os" not in made
    if to == "lightning":
        assert "boom" not in {ast.unparse(node.func) for node in ast.walk(ast.parse(made)) if isinstance(node, ast.Call)}


def test_a_mixture_takes_what_most_layers_have() -> None:
    plan = llama()
    mixed = replace(
        plan,
        strategies=(("tp+sp", replace(plan.by_name["tp+sp"], zero=1)), *plan.strategies[1:]),
    )
    made = choices(mixed)
    assert (made.zero, made.recompute, made.selective) == (1, True, False)
    assert [sentence.partition(";")[0] for sentence in made.lost] == [
        "12 of 32 layers are ZeRO-3",
        "the plan recomputes 12 of 32 layers",
    ]


@pytest.mark.parametrize("to", TARGETS)
def test_selective_recomputation_is_exported_or_said_to_be_lost(to: str) -> None:
    plan = llama()
    layers = {run.strategy for run in plan.runs}
    alike = tuple((name, replace(s, recompute="selective") if name in layers else s) for name, s in plan.strategies)
    made = export(replace(plan, strategies=alike), to)
    assert any("selective recomputation" in sentence or "kept" in sentence for sentence in made.lost)
    if to == "torchtitan":
        assert "config.activation_checkpoint = SelectiveAC.Config()" in made.text
    elif to == "torchtitan-toml":
        assert tomllib.loads(made.text)["activation_checkpoint"] == {"mode": "selective", "selective_ac_option": "op"}
    mixed = replace(plan, strategies=tuple((n, replace(s, recompute=w)) for (n, s), w in zip(alike, _WAYS, strict=False)))
    assert choices(mixed).recompute
    assert not choices(mixed).selective
    assert any("selectively; here all are in full" in sentence for sentence in choices(mixed).lost)


_WAYS: tuple[Recompute, ...] = ("selective", "full", "none")


def test_the_book() -> None:
    plan = llama()
    assert by_the_book(plan.by_name["tp+sp"].sharding)
    odd = Sharding((("q.weight", shard(1)),), (Border("q", "out", "0", PARTIAL, shard(2)),))
    assert not by_the_book(odd)
    other = replace(plan, strategies=tuple((name, Strategy(odd)) for name, _ in plan.strategies))
    for to in TARGETS:
        assert any("split" in sentence and "tp" in sentence for sentence in export(other, to).lost)


def test_names_that_count_up_have_a_pattern() -> None:
    assert wildcard(["model.layers.0", "model.layers.1"]) == "model.layers.*"
    assert wildcard(["encoder.0", "decoder.0"]) is None
    assert wildcard(["block"]) is None


def test_an_unknown_trainer_is_refused() -> None:
    with pytest.raises(UsageError, match="no export to 'x'"):
        export(llama(), "x")


@pytest.mark.parametrize("name", PLANS)
def test_transformers_takes_its_own(name: str) -> None:
    """The one target that the project's own tests have installed."""
    from transformers import TrainingArguments

    plan = PLANS[name]()
    text = export(plan, "transformers").text
    made: dict[str, Any] = {}
    exec(text.partition("training_arguments = ")[0], made)
    config = made["distributed_config"]
    sizes = config.pp_size, config.dp_replicate_size, config.fsdp_size, config.tp_size
    assert sizes == (plan.mesh.pp, plan.mesh.dp_replicate, plan.mesh.dp_shard, plan.mesh.tp)
    asked = keywords(text, "TrainingArguments")
    assert set(asked) <= {field.name for field in fields(TrainingArguments)}
    assert asked["gradient_accumulation_steps"] == plan.micro_batches
