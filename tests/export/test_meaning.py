"""Mesh and batch that every export of every sample plan says are the plan's; what its target has no words for is told.

Each is read as its target reads it. torchtitan's function and Lightning's module run on stand-ins of their packages, which the
tests do not have; transformers' classes are its own. docs/exports.md names the versions of the targets that have read them.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from autoplan import cli
from autoplan.export.exported import nodes
from autoplan.export.targets import TARGETS, export
from autoplan.files.plan import dump_plan
from autoplan.plan import Plan
from autoplan.strategy import Mesh, Recompute
from tests.export import test_importing as importing
from tests.export.test_export import at_zero, keywords
from tests.report.plans import llama, piped, single

ROOT = Path(__file__).parent.parent.parent


def at(recompute: Recompute) -> Plan:
    """Every layer recomputes so much."""
    plan = llama()
    return replace(plan, strategies=tuple((name, replace(each, recompute=recompute)) for name, each in plan.strategies))


PLANS: dict[str, Plan] = {
    **importing.PLANS,
    "ddp": replace(llama(), mesh=Mesh(dp_replicate=8)),
    "hsdp": replace(at_zero(1), mesh=Mesh(dp_replicate=2, dp_shard=2, tp=2)),
    "selective": at("selective"),
    "twelve": replace(llama(), mesh=Mesh(dp_shard=4, tp=3)),
}
WORDS = {"pp": "pipeline", "cp": "sequences", "ep": "experts"}
"""Of the sentence that says that an axis is not there."""
OVERRIDES = "PLAN_OVERRIDES"


@dataclass(frozen=True)
class Told:
    """What a configuration says; an axis that it does not name is missing."""

    micro_batch: int
    micro_batches: int
    """One after another in each data-parallel group."""
    axes: dict[str, int]
    batch: int | None = None
    devices: int | None = None


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", PLANS)
def test_an_export_means_mesh_and_batch_of_the_plan(name: str, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PLANS[name]
    made = export(plan, to)
    told = READERS[to](plan, made.text, monkeypatch)
    assert told.axes["dp"] == plan.mesh.dp
    assert (told.micro_batch, told.micro_batches) == (plan.micro_batch, plan.micro_batches)
    assert told.micro_batch * told.micro_batches * told.axes["dp"] == plan.workload.global_batch
    assert told.batch in (None, plan.workload.global_batch)
    missing = [axis for axis in ("pp", "cp", "tp", "ep") if told.axes.get(axis, 1) != getattr(plan.mesh, axis)]
    for axis in missing:
        assert any(WORDS[axis] in sentence for sentence in made.lost), axis
    if told.devices is not None:
        assert told.devices * math.prod(getattr(plan.mesh, axis) for axis in ("pp", "cp") if axis in missing) == plan.mesh.size


def _torchtitan(plan: Plan, text: str, monkeypatch: pytest.MonkeyPatch) -> Told:
    kinds: Any = SimpleNamespace(Config=SimpleNamespace)
    for module, names in {
        "torchtitan": {},
        "torchtitan.config": {"ParallelismConfig": SimpleNamespace},
        "torchtitan.distributed": {},
        "torchtitan.distributed.activation_checkpoint": {"FullAC": kinds, "SelectiveAC": kinds},
        "torchtitan.trainer": {"Trainer": kinds},
    }.items():
        stand_in(monkeypatch, module, names)
    made: dict[str, Any] = {}
    exec(text, made)
    config = made["planned"](SimpleNamespace(training=SimpleNamespace()))
    return _titan(plan, vars(config.parallelism), vars(config.training))


def _torchtitan_toml(plan: Plan, text: str, _: pytest.MonkeyPatch) -> Told:
    job = tomllib.loads(text)
    return _titan(plan, job["parallelism"], job["training"])


def _titan(plan: Plan, parallel: dict[str, Any], training: dict[str, Any]) -> Told:
    """In a pipeline a call of the schedule takes `local_batch_size` samples; without one, gradients are accumulated."""
    axes = {
        "dp": parallel["data_parallel_replicate_degree"] * parallel["data_parallel_shard_degree"],
        "pp": parallel["pipeline_parallel_degree"],
        "tp": parallel["tensor_parallel_degree"],
        "cp": parallel.get("context_parallel_degree", 1),
        "ep": parallel.get("expert_parallel_degree", 1),
    }
    assert parallel["data_parallel_shard_degree"] == plan.mesh.dp_shard
    local, whole = training["local_batch_size"], training["global_batch_size"]
    micro = parallel["pipeline_parallel_microbatch_size"] if axes["pp"] > 1 else local
    assert training["seq_len"] == plan.tokens
    return Told(micro, local // micro * (whole // (local * axes["dp"])), axes, whole)


def _megatron(plan: Plan, text: str, _: pytest.MonkeyPatch) -> Told:
    words = array(text, "PLAN_ARGS")

    def number(name: str, default: int = 1) -> int:
        return int(words[words.index(name) + 1]) if name in words else default

    axes = {axis: number(f"--{name}") for axis, name in MEGATRON.items()}
    assert number("--seq-length") == plan.tokens
    return _derived(plan, axes, number("--micro-batch-size"), number("--global-batch-size"))


MEGATRON = {
    "tp": "tensor-model-parallel-size",
    "pp": "pipeline-model-parallel-size",
    "cp": "context-parallel-size",
    "ep": "expert-model-parallel-size",
}


def _bridge(plan: Plan, text: str, _: pytest.MonkeyPatch) -> Told:
    told: dict[str, Any] = {name: yaml.safe_load(value) for name, _, value in (w.partition("=") for w in array(text, OVERRIDES))}
    axes = {axis: told[f"model.{name.replace('-', '_')}"] for axis, name in MEGATRON.items()}
    assert told["model.seq_length"] == told["dataset.seq_length"] == plan.tokens
    if plan.pipeline:
        stages = told["model.pipeline_model_parallel_layout"].split("|")
        assert [int(re.sub(r"\D", "", stage)) for stage in stages] == [len(stage) for stage in plan.stages]
        assert (told["model.virtual_pipeline_model_parallel_size"] or 1) == plan.pipeline.chunks
    return _derived(plan, axes, told["train.micro_batch_size"], told["train.global_batch_size"])


def _derived(plan: Plan, axes: dict[str, int], micro: int, whole: int) -> Told:
    """Megatron takes data parallelism and accumulation from what is left of the devices, and of the batch."""
    dp = plan.mesh.size // (axes["tp"] * axes["pp"] * axes["cp"])
    return Told(micro, whole // (micro * dp), {**axes, "dp": dp}, whole, plan.mesh.size)


def array(text: str, name: str) -> list[str]:
    """Words of a shell array."""
    found = re.search(rf"^{name}=\((.*)\)", text, re.DOTALL | re.MULTILINE)
    assert found
    return shlex.split(found.group(1))


def _deepspeed(plan: Plan, text: str, _: pytest.MonkeyPatch) -> Told:
    config = json.loads(text)
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    micro, steps, whole = (config[key] for key in keys)
    axes = {"dp": whole // (micro * steps), "tp": config.get("tensor_parallel", {}).get("autotp_size", 1)}
    return Told(micro, steps, axes, whole)


def _accelerate(plan: Plan, text: str, _: pytest.MonkeyPatch) -> Told:
    """Its batch is the script's: the sentence says which."""
    config = yaml.safe_load(text)
    sizes = config.get("parallelism_config", {"parallelism_config_dp_replicate_size": config["num_processes"]})
    keys = ("dp_replicate", "dp_shard", "tp", "cp")
    replicate, shard, tp, cp = (sizes.get(f"parallelism_config_{key}_size", 1) for key in keys)
    assert config["num_processes"] % config["num_machines"] == 0
    batch = re.search(r"batch_size=(\d+) and Accelerator\(gradient_accumulation_steps=(\d+)\)", text)
    assert batch
    return Told(
        int(batch.group(1)), int(batch.group(2)), {"dp": replicate * shard, "tp": tp, "cp": cp}, devices=config["num_processes"]
    )


def _transformers(plan: Plan, text: str, _: pytest.MonkeyPatch) -> Told:
    made: dict[str, Any] = {}
    exec(text.partition("training_arguments = ")[0], made)
    config = made["distributed_config"]
    axes = {"dp": config.dp_replicate_size * config.fsdp_size, "pp": config.pp_size, "tp": config.tp_size}
    asked = keywords(text, "TrainingArguments")
    assert set(asked) <= {field.name for field in fields(TrainingArguments)}  # to make one, accelerate is needed
    sizes = asked["per_device_train_batch_size"], asked["gradient_accumulation_steps"]
    return Told(*sizes, axes | ({"ep": config.ep_size} if config.ep_size else {}))


def _lightning(plan: Plan, text: str, monkeypatch: pytest.MonkeyPatch) -> Told:
    lightning = {"LightningModule": object, "Trainer": SimpleNamespace}
    stand_in(monkeypatch, "lightning", lightning)
    stand_in(monkeypatch, "lightning.pytorch", {})
    stand_in(monkeypatch, "lightning.pytorch.strategies", {"ModelParallelStrategy": SimpleNamespace})
    made: dict[str, Any] = {}
    exec(text, made)
    trainer = made["trainer"]
    devices = trainer.devices * trainer.num_nodes
    sizes = {"data_parallel_size": devices, "tensor_parallel_size": 1} if trainer.strategy == "ddp" else vars(trainer.strategy)
    micro = re.search(r"the DataLoader is yours: batch_size=(\d+)", text)
    assert micro
    axes = {"dp": sizes["data_parallel_size"], "tp": sizes["tensor_parallel_size"]}
    return Told(int(micro.group(1)), trainer.accumulate_grad_batches, axes, devices=devices)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, members: dict[str, Any]) -> None:
    """A module that is not installed here."""
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


READERS: dict[str, Callable[[Plan, str, pytest.MonkeyPatch], Told]] = {
    "torchtitan": _torchtitan,
    "torchtitan-toml": _torchtitan_toml,
    "megatron": _megatron,
    "megatron-bridge": _bridge,
    "deepspeed": _deepspeed,
    "accelerate": _accelerate,
    "transformers": _transformers,
    "lightning": _lightning,
}


@pytest.mark.parametrize("to", TARGETS)
def test_what_is_lost_is_said_on_stderr_and_in_the_file(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, path, out = PLANS["llama-70b-64"], tmp_path / "plan.yaml", tmp_path / "out"
    path.write_text(dump_plan(plan), encoding="utf-8")
    lost = export(plan, to).lost
    assert lost
    assert cli.main(["export", str(path), "--to", to, "-o", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.removeprefix("not expressed: ") for line in said.err.splitlines()[: len(lost)]] == list(lost)
    text = out.read_text(encoding="utf-8")
    assert all(json.dumps(sentence)[1:-1] in text or sentence in text for sentence in lost)


def test_a_recipe_is_told_what_the_plan_does_not_do() -> None:
    """Megatron-Bridge: what stays unsaid would be the recipe's."""
    words = array(export(single(), "megatron-bridge").text, OVERRIDES)
    assert {"model.sequence_parallel=false", "model.recompute_granularity=null", "model.context_parallel_size=1"} <= set(words)
    assert {"ddp.use_megatron_fsdp=false", "ddp.data_parallel_sharding_strategy=no_shard"} <= set(words)
    assert {word.partition("=")[0] for word in words} == {
        word.partition("=")[0] for word in array(export(piped(), "megatron-bridge").text, OVERRIDES)
    }
    plan = replace(single(), workload=replace(single().workload, compute_dtype="float32"))
    assert any("float32" in sentence and "recipe" in sentence for sentence in export(plan, "megatron-bridge").lost)


def test_nodes_are_alike() -> None:
    assert [nodes(devices) for devices in (1, 6, 8, 12, 16, 13)] == [(1, 1), (1, 6), (1, 8), (2, 6), (2, 8), (13, 1)]
