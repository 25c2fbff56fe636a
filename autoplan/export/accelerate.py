"""Hugging Face accelerate: the YAML of `accelerate launch --config_file`, FSDP2 with a `ParallelismConfig`."""

from __future__ import annotations

from autoplan.export.exported import Exported, choices, header, in_full, no_experts, no_pipeline, nodes, ring
from autoplan.plan import Plan

Flat = dict[str, str | int | bool]


def config(plan: Plan) -> Exported:
    """DDP where nothing is sharded, else FSDP2."""
    made, mesh, load = choices(plan), plan.mesh, plan.workload
    lost = [*made.lost, *no_pipeline(plan, "accelerate"), *ring(plan, "accelerate"), *no_experts(plan, "accelerate")]
    lost += in_full(made, "accelerate")
    processes = mesh.dp * mesh.cp * mesh.tp
    ddp = mesh.shards == 1 and mesh.tp == 1
    top: Flat = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if ddp else "FSDP",
        "mixed_precision": {"bfloat16": "bf16", "float16": "fp16"}.get(load.compute_dtype, "no"),
        "num_machines": nodes(processes)[0],
        "num_processes": processes,
        "machine_rank": 0,
        "main_training_function": "main",
    }
    sections: dict[str, Flat] = {}
    if not ddp:
        sections["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": made.zero == 3,
            "fsdp_activation_checkpointing": made.recompute,
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        }
        sections["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": mesh.dp_replicate,
            "parallelism_config_dp_shard_size": mesh.dp_shard,
            "parallelism_config_tp_size": mesh.tp,
            "parallelism_config_cp_size": mesh.cp,
        }
    lost += _lost(plan, made.zero, made.recompute and ddp)
    text = header(plan, lost) + _lines(top) + "".join(f"{name}:\n{_lines(flat, '  ')}" for name, flat in sections.items())
    return Exported(text=text, lost=tuple(lost), filename="accelerate.yaml")


def _lines(flat: Flat, indent: str = "") -> str:
    def shown(value: str | int | bool) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return f'"{value}"' if value == "no" else str(value)

    return "".join(f"{indent}{key}: {shown(value)}\n" for key, value in flat.items())


def _lost(plan: Plan, zero: int, recompute_by_hand: bool) -> list[str]:
    mesh, lost = plan.mesh, []
    lost.append(
        f"the batch is set in the script: a DataLoader with batch_size={plan.micro_batch} and "
        f"Accelerator(gradient_accumulation_steps={plan.micro_batches})"
    )
    if mesh.tp > 1:
        lost.append('how layers are split over tp is set in the script: from_pretrained(..., tp_plan="auto")')
        if mesh.dp_replicate > 1 and mesh.dp_shard == 1:
            lost.append("replicas with tp but without shards: accelerate refuses them; plan anew with --dp-replicate 1")
    if zero == 1:
        lost.append("ZeRO-1 (reduce once a step): FSDP2 reduces in every micro-batch unless the script uses accelerator.no_sync")
    if recompute_by_hand:
        lost.append("recomputation is called in the model: model.gradient_checkpointing_enable()")
    return lost
