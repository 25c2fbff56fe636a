"""transformers: a `DistributedConfig` for `from_pretrained` and the `TrainingArguments` that go with it, as Python.

Its tp plan names modules by pattern: "colwise" is a weight [out, in] split on dim 0, "rowwise" on dim 1.
"""

from __future__ import annotations

from autoplan.export.exported import (
    Choices,
    Exported,
    by_the_book,
    choices,
    header,
    in_full,
    no_context,
    no_experts,
    no_pipeline,
    wildcard,
)
from autoplan.plan import Plan

STYLES = {0: "colwise", 1: "rowwise"}


def snippet(plan: Plan) -> Exported:
    """Two objects to paste into a training script."""
    made, mesh, load = choices(plan), plan.mesh, plan.workload
    lost = [*made.lost, *in_full(made, "transformers")]
    tp_plan = _tp_plan(plan, made, lost)
    piped = mesh.pp if mesh.dp == 1 else 1
    distributed: dict[str, object] = {
        "tp_size": mesh.tp,
        "fsdp_size": mesh.dp_shard,
        "dp_replicate_size": mesh.dp_replicate,
        "pp_size": piped,
        **({"ep_size": mesh.ep, "ep_implementation": "all_to_all"} if mesh.ep > 1 and _deals(plan) else {}),
        "fsdp_mixed_precision": load.compute_dtype != load.param_dtype,
    }
    training: dict[str, object] = {
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.micro_batches,
        "activation_checkpointing": made.recompute,
        "bf16": load.compute_dtype == "bfloat16",
        "fp16": load.compute_dtype == "float16",
    }
    _told(plan, made, lost)
    rules = "".join(f"        {name!r}: {style!r},\n" for name, style in tp_plan.items())
    patterns = f"    tp_plan={{\n{rules}    }},\n" if tp_plan else ""
    text = (
        f"{header(plan, lost)}from transformers import TrainingArguments\n"
        "from transformers.distributed import DistributedConfig\n\n"
        f"distributed_config = DistributedConfig(\n{_fields(distributed)}{patterns})\n"
        "# model = AutoModelForCausalLM.from_pretrained(..., distributed_config=distributed_config)\n\n"
        f"training_arguments = TrainingArguments(\n    output_dir='out',\n{_fields(training)})\n"
    )
    return Exported(text=text, lost=tuple(lost), filename="autoplan_transformers.py")


def _fields(values: dict[str, object]) -> str:
    return "".join(f"    {name}={value!r},\n" for name, value in values.items())


def _deals(plan: Plan) -> bool:
    """Its ep is a multiple of tp, of which it has no use for cp, and goes with no pipeline."""
    mesh = plan.mesh
    return mesh.ep % mesh.tp == 0 and mesh.dp_shard * mesh.tp % mesh.ep == 0 and mesh.pp == 1


def _tp_plan(plan: Plan, made: Choices, lost: list[str]) -> dict[str, str]:
    if plan.mesh.tp == 1:
        return {}
    pattern = wildcard([name for name, _ in plan.layers()])
    weights = [(name, layout) for name, layout in made.sharding.parameters if layout.sharded and name.endswith(".weight")]
    if pattern is None or not by_the_book(made.sharding) or any(layout.blocks > 1 for _, layout in weights):
        lost.append("how layers are split over tp: the model's own tp plan is used")
        return {}
    return {f"{pattern}.{name.removesuffix('.weight')}": STYLES[layout.dim] for name, layout in weights}


def _told(plan: Plan, made: Choices, lost: list[str]) -> None:
    if made.sequence_parallel and plan.mesh.tp > 1:
        lost.append("activations split along the sequence: transformers does not do it yet, so that they need more memory")
    if plan.mesh.dp > 1:
        lost += no_pipeline(plan, "transformers' FSDP")
    elif plan.pipeline:
        sizes = ", ".join(str(len(names)) for names in plan.stages)
        lost.append(f"the cut of the pipeline ({sizes} layers) and its schedule ({plan.pipeline.schedule}): transformers chooses")
    lost += no_context(plan, "transformers' DistributedConfig")
    if not _deals(plan):
        lost += no_experts(
            plan, "transformers, whose ep is a multiple of tp, divides dp_shard x tp and has no pipeline beside it,"
        )
    if made.zero in (1, 2):
        lost.append(f"ZeRO-{made.zero}: transformers' FSDP frees gathered parameters after the forward pass (ZeRO-3)")
