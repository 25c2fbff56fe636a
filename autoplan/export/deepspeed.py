"""DeepSpeed: the JSON of `deepspeed.initialize(config=...)`. JSON has no comments: what is lost stands under "_autoplan"."""

from __future__ import annotations

import json
from typing import Any

from autoplan.export.exported import Choices, Exported, choices, clean, in_full, no_context
from autoplan.plan import Plan

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def config(plan: Plan) -> Exported:
    """Batch, number formats, ZeRO and AutoTP."""
    made = choices(plan)
    lost = list(made.lost)
    load = plan.workload
    body: dict[str, Any] = {
        "train_batch_size": load.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.micro_batches,
        "zero_optimization": _zero(plan, made, lost),
    }
    if load.compute_dtype in ("bfloat16", "float16"):
        body[{"bfloat16": "bf16", "float16": "fp16"}[load.compute_dtype]] = {"enabled": True}
    if load.reduce_dtype in DTYPES:
        body["data_types"] = {"grad_accum_dtype": DTYPES[load.reduce_dtype]}
        body["communication_data_type"] = DTYPES[load.reduce_dtype]
    if plan.mesh.tp > 1:
        body["tensor_parallel"] = {"autotp_size": plan.mesh.tp}
        lost.append("which matrices are split over tp: AutoTP finds them itself, and does not split along the sequence")
    lost += no_context(plan, "DeepSpeed's configuration (its Ulysses is set in the model)")
    if plan.mesh.ep > 1:
        lost.append(
            f"experts over ep {plan.mesh.ep}: DeepSpeed sets it in the model, deepspeed.moe.layer.MoE(ep_size={plan.mesh.ep})"
        )
    _told(plan, made, lost)
    about = {"model": clean(plan.model), "mesh": str(plan.mesh), "devices": plan.mesh.size, "not_expressed": lost}
    return Exported(text=json.dumps({"_autoplan": about, **body}, indent=2) + "\n", lost=tuple(lost), filename="ds_config.json")


def _zero(plan: Plan, made: Choices, lost: list[str]) -> dict[str, Any]:
    mesh, stage = plan.mesh, made.zero
    if mesh.tp > 1 and stage == 3:
        lost.append("ZeRO-3 together with tp: AutoTP trains with ZeRO-2 at most, which keeps parameters whole: it may not fit")
        stage = 2
    elif stage == 2:
        lost.append("ZeRO-2 of the plan frees gathered parameters after the backward pass; DeepSpeed's keeps them whole")
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if mesh.dp_replicate > 1 and stage:
        lost.append(f"the {mesh.dp_replicate} replicas of {mesh.dp_shard} shards: DeepSpeed splits over all {mesh.dp} groups")
    return zero


def _told(plan: Plan, made: Choices, lost: list[str]) -> None:
    if plan.pipeline:
        sizes = ", ".join(str(len(names)) for names in plan.stages)
        lost.append(
            f"the pipeline: build a deepspeed.pipe.PipelineModule with num_stages={plan.mesh.pp} (layers by stage: {sizes}); "
            f"it runs 1f1b, and the plan {plan.pipeline.schedule}"
        )
    lost += in_full(made, "gradient checkpointing")
    if made.recompute:
        lost.append("recomputation is called in the model: model.gradient_checkpointing_enable()")
