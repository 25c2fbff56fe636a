"""Megatron-LM: arguments of `pretrain_gpt.py`, as a shell file that defines the array PLAN_ARGS.

Its distributed optimizer is ZeRO-1: gradients whole, reduced once a step, optimizer states split. Levels 2 and 3 are Megatron
FSDP's `optim_grads` and `optim_grads_params`.
"""

from __future__ import annotations

import shlex

from autoplan.export.exported import Choices, Exported, choices, header, stage_sizes
from autoplan.plan import Plan

SHARDING = {2: "optim_grads", 3: "optim_grads_params"}
OPTIMIZERS = {"adamw": "adam", "adam": "adam", "sgd": "sgd", "sgd_momentum": "sgd"}

Flags = dict[str, str | int | None]
"""Arguments without their dashes, in order; None for one that has no value."""


def arguments(plan: Plan) -> Exported:
    """Everything that the plan decides; the shape of the model stays with the user."""
    flags, lost = decided(plan)
    body = "".join(f"  --{name}{'' if value is None else ' ' + shlex.quote(str(value))}\n" for name, value in flags.items())
    shape = "--hidden-size ... --num-experts" if plan.mesh.ep > 1 else "--hidden-size"
    use = f'# torchrun ... pretrain_gpt.py "${{PLAN_ARGS[@]}}" {shape} ... (the rest of your model and data)\n'
    text = f"{header(plan, lost)}{use}{queues(plan, flags)}PLAN_ARGS=(\n{body})\n"
    return Exported(text=text, lost=tuple(lost), filename="autoplan-megatron.sh")


def decided(plan: Plan) -> tuple[Flags, list[str]]:
    """What the plan says, in Megatron's words, and what it has no words for."""
    made = choices(plan)
    lost = [sentence for sentence in made.lost if "recomputes" not in sentence]
    flags = {
        **_mesh(plan, made),
        **_pipeline(plan, lost),
        **_data_parallel(plan, made, lost),
        **_recompute(plan, lost),
        **_workload(plan, lost),
    }
    return flags, lost


def queues(plan: Plan, flags: Flags) -> str:
    """One queue, so that collectives of tp start before the computation that hides them; Megatron FSDP forbids it."""
    return "export CUDA_DEVICE_MAX_CONNECTIONS=1\n" if plan.mesh.tp > 1 and "use-megatron-fsdp" not in flags else ""


def _mesh(plan: Plan, made: Choices) -> Flags:
    mesh = plan.mesh
    flags: Flags = {"tensor-model-parallel-size": mesh.tp, "pipeline-model-parallel-size": mesh.pp}
    if mesh.cp > 1:
        flags |= {"context-parallel-size": mesh.cp, "cp-comm-type": "p2p" if mesh.cp_kind == "ring" else "a2a"}
    if mesh.ep > 1:  # of each expert nothing is split over tp, and ep runs through tp and cp first, as in the plan
        flags |= {"expert-model-parallel-size": mesh.ep, "expert-tensor-parallel-size": 1}
        flags["moe-token-dispatcher-type"] = "alltoall"
    if mesh.tp > 1 and made.sequence_parallel:
        flags["sequence-parallel"] = None
    return flags


def _pipeline(plan: Plan, lost: list[str]) -> Flags:
    flags: Flags = {"num-layers": sum(stage_sizes(plan))}
    if plan.pipeline is None:
        return flags
    if plan.pipeline.schedule == "gpipe":
        lost.append("the schedule gpipe: Megatron runs 1f1b, which holds fewer micro-batches and passes them on more visibly")
    if plan.pipeline.schedule == "zero-bubble":
        lost.append("the schedule zero-bubble: Megatron runs 1f1b, which waits longer, and holds less on the last stages")
    sizes = [f"t*{size}" for size in stage_sizes(plan)]
    sizes[0], sizes[-1] = f"E{sizes[0]}", f"{sizes[-1]}L"
    return {**flags, "pipeline-model-parallel-layout": "|".join(sizes)}


def _data_parallel(plan: Plan, made: Choices, lost: list[str]) -> Flags:
    mesh = plan.mesh
    flags: Flags = {"overlap-grad-reduce": None} if mesh.dp * mesh.cp > 1 else {}
    if made.zero == 0:
        return flags
    flags["overlap-param-gather"] = None
    if made.zero == 1:
        replicas: Flags = {"num-distributed-optimizer-instances": mesh.dp_replicate} if mesh.dp_replicate > 1 else {}
        return {**flags, "use-distributed-optimizer": None, **replicas}
    if made.zero == 2:
        lost.append("ZeRO-2 of the plan frees gathered parameters after the backward pass; optim_grads keeps them whole")
    if mesh.dp_replicate > 1:
        lost.append(
            f"the {mesh.dp_replicate} replicas of {mesh.dp_shard} shards: here everything is split over all {mesh.dp} groups"
        )
    if plan.pipeline:
        lost.append(f"ZeRO-{made.zero} in a pipeline: check that your version of Megatron FSDP allows it")
    return {
        **flags,
        "use-megatron-fsdp": None,
        "use-distributed-optimizer": None,
        "data-parallel-sharding-strategy": SHARDING[made.zero],
        "ckpt-format": "fsdp_dtensor",
        "no-gradient-accumulation-fusion": None,
    }


def _recompute(plan: Plan, lost: list[str]) -> Flags:
    """Megatron recomputes the first layers of every virtual stage, as many in each of them."""
    recompute = {name: strategy.recompute != "none" for name, strategy in plan.layers()}
    if any(strategy.recompute == "selective" for _, strategy in plan.layers()):
        lost.append("selective recomputation: Megatron's keeps more (it recomputes attention alone), so layers are in full")
    stages = [[recompute[name] for name in names] for names in plan.stages]
    most = max(sum(stage) for stage in stages)
    if not most:
        return {}
    if any(stage != sorted(stage, reverse=True) for stage in stages):
        lost.append("which layers are recomputed: Megatron recomputes the first ones of a stage")
    if len({sum(stage) for stage in stages}) > 1:
        fewer = min(sum(stage) for stage in stages)
        lost.append(f"stages recompute from {fewer} to {most} layers; here all recompute {most}")
    return {"recompute-granularity": "full", "recompute-method": "block", "recompute-num-layers": most}


def _workload(plan: Plan, lost: list[str]) -> Flags:
    load = plan.workload
    flags: Flags = {
        "micro-batch-size": plan.micro_batch,
        "global-batch-size": load.global_batch,
        "seq-length": plan.tokens,
        "optimizer": OPTIMIZERS[load.optimizer],
    }
    half = {"bfloat16": "bf16", "float16": "fp16"}.get(load.compute_dtype)
    if half:
        flags[half] = None
    if half == "bf16" and load.reduce_dtype == "float32":
        flags["accumulate-allreduce-grads-in-fp32"] = None
    if half and load.param_dtype == "float32":
        lost.append("memory: Megatron keeps a copy of the parameters in the compute dtype beside those in float32")
    elif half and load.param_dtype == load.compute_dtype:
        lost.append(f"parameters in {load.param_dtype} only: Megatron keeps float32 copies, which need more memory")
    return flags
