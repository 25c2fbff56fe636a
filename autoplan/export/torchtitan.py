"""torchtitan: a Python function for its config registry (0.3), or the sections of a TOML job file (0.2).

torchtitan names the parts of a model itself (`tok_embeddings`, `layers.0` ..., `norm`, `lm_head` or `output`): the plan's cut is
carried over by counting layers. With a pipeline one call of the schedule runs all micro-batches of the step; without one,
torchtitan accumulates gradients until the global batch is reached.
"""

from __future__ import annotations

from collections.abc import Iterator

from autoplan.export.exported import Choices, Exported, choices, header, no_experts, ring, stage_sizes
from autoplan.plan import Plan

SCHEDULES = {
    "1f1b": "1F1B", "gpipe": "GPipe", "interleaved-1f1b": "Interleaved1F1B", "zero-bubble": "InterleavedZeroBubble"
}  # fmt: skip


def registry(plan: Plan) -> Exported:
    """A function that changes the config of a model of torchtitan 0.3."""
    made = choices(plan, compiles=True)
    lost = _lost(plan, made)
    parallelism = {**_parallelism(plan, made), **_cut(plan, "lm_head")}
    fields = "".join(f"        {name}={value!r},\n" for name, value in parallelism.items() if name != CUT)
    if CUT in parallelism:
        stages = "".join(f"            {stage!r},\n" for stage in parallelism[CUT])  # type: ignore[attr-defined]
        fields += f"        {CUT}=[\n{stages}        ],\n"
    values = {**_training(plan), **({"disable_cuda_graphs": True} if plan.pipeline else {})}  # they do not go together
    training = "".join(f"    config.training.{name} = {value!r}\n" for name, value in values.items())
    policy = "SelectiveAC" if made.selective else "FullAC"
    recompute = f"{policy}.Config()" if made.recompute else "None"
    text = (
        f"{header(plan, lost)}"
        "from torchtitan.config import ParallelismConfig\n"
        f"{f'from torchtitan.distributed.activation_checkpoint import {policy}' + chr(10) if made.recompute else ''}"
        "from torchtitan.trainer import Trainer\n\n\n"
        "def planned(config: Trainer.Config) -> Trainer.Config:\n"
        '    """Call it with the config of your model, such as `llama3_8b()`, in your config_registry.py."""\n'
        f"    config.parallelism = ParallelismConfig(\n{fields}    )\n"
        f"{training}"
        f"    config.activation_checkpoint = {recompute}\n"
        "    return config\n"
    )
    return Exported(text=text, lost=lost, filename="autoplan_config.py")


CUT = "module_fqns_per_model_part"


def toml(plan: Plan) -> Exported:
    """The sections of a job file of torchtitan 0.2."""
    made = choices(plan)
    lost = _lost(plan, made)
    parallelism = _parallelism(plan, made)
    sequence = parallelism.pop("enable_sequence_parallel")
    parallelism = {**parallelism, "disable_loss_parallel": False, **_cut(plan, "output")}
    if not sequence and plan.mesh.tp > 1:
        lost = (*lost, "torchtitan 0.2 splits activations along the sequence whenever tp is above 1; the plan does not")
    sections: dict[str, dict[str, object]] = {
        "training": _training(plan),
        "parallelism": parallelism,
        "activation_checkpoint": _recompute(made),
        **({"compile": {"enable": True, "components": ["model"]}} if plan.workload.compile else {}),
    }
    body = "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in values.items()) for name, values in sections.items()
    )
    return Exported(text=f"{header(plan, lost)}\n{body}", lost=lost, filename="autoplan.toml")


def _recompute(made: Choices) -> dict[str, object]:
    if made.selective:
        return {"mode": "selective", "selective_ac_option": "op"}
    return {"mode": "full" if made.recompute else "none"}


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _parallelism(plan: Plan, made: Choices) -> dict[str, object]:
    mesh = plan.mesh
    fields: dict[str, object] = {
        "data_parallel_replicate_degree": mesh.dp_replicate,
        "data_parallel_shard_degree": mesh.dp_shard,
        "fsdp_reshard_after_forward": "always" if made.zero == 3 else "never" if made.zero else "default",
        **({"context_parallel_degree": mesh.cp} if mesh.cp > 1 else {}),
        **({"expert_parallel_degree": mesh.ep} if mesh.ep > 1 and _folds(plan) else {}),
        "tensor_parallel_degree": mesh.tp,
        "enable_sequence_parallel": made.sequence_parallel,
        "pipeline_parallel_degree": mesh.pp,
    }
    if plan.pipeline:
        fields["pipeline_parallel_schedule"] = SCHEDULES[plan.pipeline.schedule]
        fields["pipeline_parallel_microbatch_size"] = plan.micro_batch
    return fields


def _folds(plan: Plan) -> bool:
    """torchtitan's ep takes all of cp and tp, and some of dp_shard: the same devices as the plan's, where that is enough."""
    return plan.mesh.ep % (plan.mesh.cp * plan.mesh.tp) == 0


def _cut(plan: Plan, head: str) -> dict[str, object]:
    """Names of torchtitan's modules in every stage."""
    if plan.pipeline is None:
        return {}
    stages: list[list[str]] = []
    for size in stage_sizes(plan):
        first = sum(len(stage) for stage in stages)
        stages.append([f"layers.{i}" for i in range(first, first + size)])
    stages[0].insert(0, "tok_embeddings")
    stages[-1] += ["norm", head]
    return {CUT: stages}


def _training(plan: Plan) -> dict[str, object]:
    local = plan.micro_batch * (plan.micro_batches if plan.pipeline else 1)
    load = plan.workload
    return {
        "local_batch_size": local,
        "global_batch_size": load.global_batch,
        "seq_len": plan.tokens,
        "dtype": "bfloat16" if load.param_dtype == "bfloat16" else "float32",
        "mixed_precision_param": "bfloat16" if load.compute_dtype == "bfloat16" else "float32",
    }


def _split(plan: Plan, made: Choices) -> Iterator[str]:
    """What PyTorch's own zero-bubble schedule does otherwise."""
    if plan.pipeline is None or plan.pipeline.schedule != "zero-bubble":
        return
    yield (
        "memory: until weights have their gradients, torchtitan keeps all that a micro-batch's backward pass had, and not only "
        "what these are made of: it may not fit"
    )
    if made.recompute:
        yield "time: a layer that is recomputed runs again once more for every weight of it"
    if plan.micro_batches % max(1, plan.micro_batches // plan.mesh.pp):
        m, pp = plan.micro_batches, plan.mesh.pp
        yield f"{m} micro-batches: torchtitan's schedule wants as many in each of its rounds over {pp} stages"


def _lost(plan: Plan, made: Choices) -> tuple[str, ...]:
    lost, load = [*made.lost, *ring(plan, "torchtitan"), *_split(plan, made)], plan.workload
    if not _folds(plan):
        lost += no_experts(plan, f"torchtitan, whose ep is a multiple of cp x tp ({plan.mesh.cp * plan.mesh.tp}),")
    if made.selective:
        lost.append("which results are kept: torchtitan has a list of its own, and up to 0.2 every second product runs again")
    if made.zero == 1 and plan.pipeline is None:  # torch's pipelines gather and reduce once a step, see autoplan.importing
        lost.append(
            "ZeRO-1 (gather once a step, reduce once a step): torchtitan's nearest keeps parameters gathered until the backward "
            "pass, and reduces gradients in every micro-batch"
        )
    if load.reduce_dtype != "float32" and plan.mesh.shards > 1:
        lost.append(f"gradients are reduced in float32, not in {load.reduce_dtype}")
    for name, dtype in (("parameters", load.param_dtype), ("computation", load.compute_dtype)):
        if dtype not in ("bfloat16", "float32"):
            lost.append(f"{name} in {dtype}: float32 is used")
    if not load.optimizer.startswith("adam"):
        lost.append(f"the optimizer {load.optimizer}: torchtitan has Adam and AdamW")
    return tuple(lost)
