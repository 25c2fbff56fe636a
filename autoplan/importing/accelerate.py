"""Hugging Face accelerate: the YAML of `accelerate launch`: DDP, FSDP, and a `parallelism_config`. The batch is in the script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoplan.errors import UsageError
from autoplan.importing.configuration import Configuration, Section
from autoplan.strategy import Zero

KINDS = ("no", "multi_gpu", "multi_cpu", "fsdp")
_SHARDING: dict[str, Zero] = {"full_shard": 3, "hybrid_shard": 3, "shard_grad_op": 2, "hybrid_shard_zero2": 2}
_AXES = ("dp_replicate", "dp_shard", "cp", "tp", "sp")
PRECISION = {"no": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}


def configuration(path: Path, document: dict[str, Any]) -> Configuration:
    """Raises `UsageError` naming key and file."""
    words = {key: "no" if document.get(key) is False else document.get(key) for key in ("distributed_type", "mixed_precision")}
    top = Section(path, {**document, **words})  # an unquoted `no` is YAML's false
    kind = top.word("distributed_type", "no") if top.has("distributed_type") else "no"
    if kind not in KINDS:
        raise UsageError(
            f"{path}: 'distributed_type' is {kind[:40].upper()}, which autoplan does not read.",
            "It reads FSDP, MULTI_GPU and NO.",
        )
    lost: list[str] = []
    axes = _axes(top.section("parallelism_config"), lost)
    processes = top.maybe("num_processes") or 1
    within = axes["cp"] * axes["tp"]
    fsdp = top.section("fsdp_config")
    if kind != "fsdp":
        axes |= {"dp_replicate": processes // within, "dp_shard": 1}
    elif not top.has("parallelism_config"):
        axes["dp_shard"] = processes
    zero = _zero(fsdp, lost) if kind == "fsdp" else 3
    if fsdp.flag("fsdp_offload_params"):
        lost.append("parameters on the CPU (fsdp_offload_params): they are priced on the device")
    if axes["cp"] > 1:
        lost.append("sequences are split as a ring there; an exchange of heads around attention (Ulysses) is priced")
    return Configuration(
        path=path,
        trainer="accelerate",
        gpus=processes,
        dp_replicate=axes["dp_replicate"],
        dp_shard=axes["dp_shard"],
        cp=axes["cp"],
        tp=axes["tp"],
        zero=zero,
        recompute_every=int(fsdp.flag("fsdp_activation_checkpointing")),
        workload=_workload(top, kind, lost),
        lost=tuple(lost),
    )


def _axes(section: Section, lost: list[str]) -> dict[str, int]:
    prefix = "parallelism_config_"
    lost += section.unknown([*(f"{prefix}{axis}_size" for axis in _AXES), *_AXES_BESIDE])
    sizes = {axis: section.count(f"{prefix}{axis}_size") for axis in _AXES}
    if sizes["cp"] > 1 and sizes["sp"] > 1:
        raise section.wrong(f"{prefix}sp_size", "1 beside cp, which splits the sequence already")
    return {
        "dp_replicate": sizes["dp_replicate"],
        "dp_shard": sizes["dp_shard"],
        "cp": max(sizes["cp"], sizes["sp"]),
        "tp": sizes["tp"],
    }


_AXES_BESIDE = (
    "parallelism_config_cp_comm_strategy",
    "parallelism_config_cp_backend",
    "parallelism_config_sp_backend",
    "parallelism_config_sp_seq_length",
    "parallelism_config_sp_seq_length_is_variable",
    "parallelism_config_sp_attn_implementation",
)


def _zero(fsdp: Section, lost: list[str]) -> Zero:
    """Of FSDP2 `fsdp_reshard_after_forward` true or false; FSDP1 names a strategy, in that key or in its own."""
    for key in ("fsdp_reshard_after_forward", "fsdp_sharding_strategy"):
        found = fsdp.values.get(key)
        if isinstance(found, bool) or str(found).lower() in ("true", "false"):
            return 3 if fsdp.flag(key) else 2
        if found is not None:
            name = fsdp.word(key, "", (*_SHARDING, "no_shard"))
            if name == "no_shard" or name.startswith("hybrid"):
                lost.append(f"{name.upper()} of FSDP1: everything is split over all devices here")
            return _SHARDING.get(name, 2)
    return 3


def _workload(top: Section, kind: str, lost: list[str]) -> dict[str, str]:
    asked = top.word("mixed_precision", "no", tuple(PRECISION)) if top.has("mixed_precision") else "no"
    if asked == "fp8":
        lost.append("products in 8 bits (fp8): they are priced in bfloat16")
    compute = PRECISION[asked]
    return {"compute_dtype": compute, "reduce_dtype": compute if kind == "fsdp" else "float32"}
