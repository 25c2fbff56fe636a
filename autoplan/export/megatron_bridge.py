"""Megatron-Bridge: overrides of a recipe, as a shell file that defines the array PLAN_OVERRIDES.

They are Megatron-LM's arguments under other names. A recipe has choices of its own: what the plan does not do is switched off.
"""

from __future__ import annotations

from autoplan.export.exported import Exported, header
from autoplan.export.megatron import Flags, decided, queues
from autoplan.plan import Plan

Value = str | int | bool | None

FIELDS: dict[str, tuple[tuple[str, ...], Value]] = {
    "tensor-model-parallel-size": (("model.tensor_model_parallel_size",), 1),
    "pipeline-model-parallel-size": (("model.pipeline_model_parallel_size",), 1),
    "context-parallel-size": (("model.context_parallel_size",), 1),
    "cp-comm-type": (("model.cp_comm_type",), None),
    "expert-model-parallel-size": (("model.expert_model_parallel_size",), 1),
    "expert-tensor-parallel-size": (("model.expert_tensor_parallel_size",), None),
    "sequence-parallel": (("model.sequence_parallel",), False),
    "num-layers": (("model.num_layers",), None),
    "pipeline-model-parallel-layout": (("model.pipeline_model_parallel_layout",), None),
    "overlap-grad-reduce": (("ddp.overlap_grad_reduce",), False),
    "overlap-param-gather": (("ddp.overlap_param_gather", "optimizer.overlap_param_gather"), False),
    "use-megatron-fsdp": (("ddp.use_megatron_fsdp", "dist.use_megatron_fsdp"), False),
    "use-distributed-optimizer": (("ddp.use_distributed_optimizer", "optimizer.use_distributed_optimizer"), False),
    "num-distributed-optimizer-instances": (("ddp.num_distributed_optimizer_instances",), 1),
    "data-parallel-sharding-strategy": (("ddp.data_parallel_sharding_strategy",), "no_shard"),
    "recompute-granularity": (("model.recompute_granularity",), None),
    "recompute-method": (("model.recompute_method",), None),
    "recompute-num-layers": (("model.recompute_num_layers",), None),
    "micro-batch-size": (("train.micro_batch_size",), None),
    "global-batch-size": (("train.global_batch_size",), None),
    "seq-length": (("model.seq_length", "dataset.seq_length"), None),
    "optimizer": (("optimizer.optimizer",), None),
}
"""Fields of each argument of Megatron-LM, and what they are without it."""

ONLY: dict[str, tuple[str, Value]] = {
    "moe-token-dispatcher-type": ("model.moe_token_dispatcher_type", "alltoall"),
    "ckpt-format": ("checkpoint.ckpt_format", "fsdp_dtensor"),
    "no-gradient-accumulation-fusion": ("model.gradient_accumulation_fusion", False),
    "bf16": ("mixed_precision", "bf16_mixed"),
    "fp16": ("mixed_precision", "fp16_mixed"),
}
"""Arguments without which a recipe's choice stays."""


def overrides(plan: Plan) -> Exported:
    """Everything that the plan decides; the model is the recipe's."""
    flags, lost = decided(plan)
    lost += _precision(plan)
    body = "".join(f"  {_word(name, value)}\n" for name, value in _settings(plan, flags).items())
    use = '# torchrun ... scripts/training/run_recipe.py --recipe ... --mode pretrain "${PLAN_OVERRIDES[@]}"\n'
    several = "export CUDA_DEVICE_MAX_CONNECTIONS=8\n" if "use-megatron-fsdp" in flags else ""  # a recipe may set it to 1
    text = f"{header(plan, lost)}{use}{queues(plan, flags)}{several}PLAN_OVERRIDES=(\n{body})\n"
    return Exported(text=text, lost=tuple(lost), filename="autoplan-bridge.sh")


def _settings(plan: Plan, flags: Flags) -> dict[str, Value]:
    settings: dict[str, Value] = {}
    for flag, (names, without) in FIELDS.items():
        value = without if flag not in flags else True if flags[flag] is None else flags[flag]
        settings |= dict.fromkeys(names, value)
    chunks = plan.pipeline.chunks if plan.pipeline else 1
    settings["model.virtual_pipeline_model_parallel_size"] = chunks if chunks > 1 else None
    return settings | dict(setting for flag, setting in ONLY.items() if flag in flags)


def _word(name: str, value: Value) -> str:
    """One override: quoted once for Hydra and once for the shell where it has signs that both of them read."""
    if isinstance(value, str) and not value.replace("_", "").isalnum():
        return f"'{name}=\"{value}\"'"
    return f"{name}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"


def _precision(plan: Plan) -> list[str]:
    """A recipe of mixed precision has a name, and gradients of its own."""
    load = plan.workload
    reduced = {"bfloat16": "float32", "float16": "float16"}.get(load.compute_dtype)
    if reduced is None:
        return [f"computation in {load.compute_dtype}: the mixed precision of the recipe stays, change it there"]
    if load.reduce_dtype != reduced:
        return [f"gradients are reduced in {reduced}, not in {load.reduce_dtype}: change grad_reduce_in_fp32 of the recipe"]
    return []
