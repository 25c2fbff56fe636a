"""torchtitan 0.2: the sections `parallelism`, `training`, `activation_checkpoint`, `optimizer` of a TOML job file.

In a pipeline FSDP's gradients are reduced in the last micro-batch alone and parameters that are not freed after the forward pass
stay for all of them (torch.distributed.pipelining), which is what a plan calls ZeRO-1.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from autoplan.errors import UsageError
from autoplan.importing.configuration import Configuration, Section
from autoplan.schedule import ScheduleKind
from autoplan.strategy import Recompute, Zero

SCHEDULES: dict[str, ScheduleKind] = {"1f1b": "1f1b", "gpipe": "gpipe", "interleaved1f1b": "interleaved-1f1b"}
SPLIT = "interleavedzerobubble"
"""With one stage a rank it is what a plan calls zero-bubble."""
NEAREST: dict[str, ScheduleKind] = {
    SPLIT: "interleaved-1f1b",
    "zbvzerobubble": "interleaved-1f1b",
    "dualpipev": "interleaved-1f1b",
    "loopedbfs": "interleaved-1f1b",
}

_KNOWN = (
    *("data_parallel_replicate_degree", "data_parallel_shard_degree", "fsdp_reshard_after_forward", "tensor_parallel_degree"),
    *("enable_sequence_parallel", "disable_loss_parallel", "enable_async_tensor_parallel", "enable_compiled_autograd"),
    *("pipeline_parallel_degree", "module_fqns_per_model_part", "pipeline_parallel_split_points"),
    *("pipeline_parallel_layers_per_stage", "pipeline_parallel_first_stage_less_layers"),
    *("pipeline_parallel_last_stage_less_layers", "pipeline_parallel_schedule", "pipeline_parallel_schedule_csv"),
    *("pipeline_parallel_microbatch_size", "context_parallel_degree", "context_parallel_rotate_method"),
    *("context_parallel_load_balancer", "expert_parallel_degree", "expert_tensor_parallel_degree"),
)


def configuration(path: Path, document: dict[str, Any]) -> Configuration:
    """Raises `UsageError` naming key and file."""
    top = Section(path, document)
    parallel, training = top.section("parallelism"), top.section("training")
    lost = [*parallel.unknown(_KNOWN), *_beside(top, parallel, training)]
    pp, tp = parallel.count("pipeline_parallel_degree"), parallel.count("tensor_parallel_degree")
    local = training.count("local_batch_size", 8)
    every, recompute = _recompute(top.section("activation_checkpoint"), lost)
    cut = _cut(parallel, pp, lost) if pp > 1 else {}
    cp, ep = parallel.count("context_parallel_degree"), parallel.count("expert_parallel_degree")
    if cp > 1:
        lost.append("sequences are split as a ring there; an exchange of heads around attention (Ulysses) is priced")
    whole = training.count("global_batch_size", -1, least=-1)
    micro_batch = parallel.count("pipeline_parallel_microbatch_size") if pp > 1 else local
    if pp > 1 and local % micro_batch:
        raise UsageError(
            f"{path}: 'training.local_batch_size' {local} does not divide into micro-batches of {micro_batch} samples.",
            "Change it, or 'parallelism.pipeline_parallel_microbatch_size'.",
        )
    return Configuration(
        path=path,
        trainer="torchtitan",
        pp=pp,
        dp_replicate=parallel.count("data_parallel_replicate_degree"),
        dp_shard=parallel.degree("data_parallel_shard_degree"),
        cp=cp,
        tp=tp,
        ep=ep,
        sequence_parallel=tp > 1 and parallel.flag("enable_sequence_parallel", True),
        zero=_zero(parallel, pp),
        micro_batch=micro_batch,
        local_batch=local,
        global_batch=whole if whole > 0 else None,
        recompute_every=every,
        recompute=recompute,
        tokens=training.count("seq_len", 2048),
        workload=_workload(top, training, max(cp, tp, ep) > 1, lost),
        lost=tuple(lost),
        **cut,
    )


def _zero(parallel: Section, pp: int) -> Zero:
    policy = parallel.word("fsdp_reshard_after_forward", "default", ("default", "always", "never"))
    if policy == "always" or (policy == "default" and pp == 1):
        return 3
    return 1 if pp > 1 else 2


def _cut(parallel: Section, pp: int, lost: list[str]) -> dict[str, Any]:
    """Schedule and stages."""
    asked = parallel.word("pipeline_parallel_schedule", "1f1b")
    if asked not in SCHEDULES and asked not in NEAREST:
        parallel.word("pipeline_parallel_schedule", "", ("1F1B".lower(), *list(SCHEDULES)[1:], *NEAREST))
    schedule = SCHEDULES.get(asked) or NEAREST[asked]
    if asked == SPLIT and len(parallel.values.get("module_fqns_per_model_part") or ()) == pp:
        schedule = "zero-bubble"
    elif asked in NEAREST:
        lost.append(f"the schedule {parallel.values['pipeline_parallel_schedule']}: {schedule} is priced, which waits more")
    if parallel.values.get("pipeline_parallel_schedule_csv"):
        lost.append("the schedule of pipeline_parallel_schedule_csv is not read")
    single = schedule != "interleaved-1f1b"
    sizes = _by_hand(parallel, pp, single)
    if sizes:
        return {"schedule": schedule, "chunks": len(sizes) // pp, "stage_sizes": sizes}
    less = "pipeline_parallel_first_stage_less_layers", "pipeline_parallel_last_stage_less_layers"
    weights = parallel.count(less[0], 1, least=0), parallel.count(less[1], 1, least=0)
    each = parallel.maybe("pipeline_parallel_layers_per_stage")
    chunks = 1 if single else 2 if each is None else None
    return {"schedule": schedule, "chunks": chunks, "layers_per_stage": each or 1, "weights": weights}


def _by_hand(parallel: Section, pp: int, single: bool) -> tuple[int, ...]:
    """Layers of every virtual stage, where they are named; () where torchtitan deals them."""
    key = "module_fqns_per_model_part"
    if parallel.values.get("pipeline_parallel_split_points"):
        raise parallel.wrong("pipeline_parallel_split_points", f"read by autoplan: name the stages' modules in '{key}' instead")
    parts = parallel.values.get(key)
    if not parts:
        return ()
    if not isinstance(parts, list) or not all(isinstance(part, list) for part in parts):
        raise parallel.wrong(key, "a list of lists of modules")
    names = [[name for name in part if re.fullmatch(r"layers\.\d{1,6}", str(name))] for part in parts]
    flat = [name for part in names for name in part]
    if flat != [f"layers.{i}" for i in range(len(flat))] or not all(names):
        raise parallel.wrong(key, "all of layers.0, layers.1 ... in order, at least one in every stage")
    if len(parts) % pp or (single and len(parts) != pp):
        raise parallel.wrong(key, f"{pp} stages" if single else f"a multiple of {pp} stages")
    return tuple(map(len, names))


def _recompute(section: Section, lost: list[str]) -> tuple[int, Recompute]:
    """Which layers (see `Configuration.recompute_every`), and how."""
    mode = section.word("mode", "selective", ("none", "full", "selective", "memory_budget"))
    if mode in ("none", "full"):
        return int(mode == "full"), "full"
    option = str(section.values.get("selective_ac_option", "2" if mode == "selective" else ""))
    if mode == "selective" and option.isdecimal() and int(option[:9]) > 0:
        return int(option[:9]), "full"
    if mode == "selective" and option != "op":
        raise section.wrong("selective_ac_option", '"op" or a whole number from 1 on')
    if mode == "selective":
        lost.append("every second product, which runs again there: here all are kept, which takes more memory and less time")
        return 1, "selective"
    lost.append(
        "recomputation by a memory budget: that of every second layer is priced, which costs about as much time and memory"
    )
    return 2, "full"


def _workload(top: Section, training: Section, spread: bool, lost: list[str]) -> dict[str, str | bool]:
    """`spread`: over axes under which layers are not compiled here."""
    dtypes, compiled = ("float32", "bfloat16"), top.section("compile").flag("enable")
    if compiled and spread:
        lost.append("torch.compile of layers that are spread over tp, cp or ep: they are priced uncompiled")
    found: dict[str, str | bool] = {
        "compile": compiled and not spread,
        "param_dtype": training.word("dtype", "float32", dtypes),
        "compute_dtype": training.word("mixed_precision_param", "bfloat16", dtypes),
        "reduce_dtype": training.word("mixed_precision_reduce", "float32", dtypes),
    }
    if found["param_dtype"] == "bfloat16":
        found["compute_dtype"] = "bfloat16"
    name = top.section("optimizer").word("name", "adamw")
    if name in ("adam", "adamw"):
        return {**found, "optimizer": name}
    lost.append(f"the optimizer {name}: AdamW is priced")
    return {**found, "optimizer": "adamw"}


def _beside(top: Section, parallel: Section, training: Section) -> list[str]:
    """What changes the price and has no words here."""
    lost = []
    if training.flag("enable_cpu_offload"):
        lost.append("parameters and optimizer states on the CPU (enable_cpu_offload): they are priced on the device")
    if parallel.flag("enable_async_tensor_parallel"):
        lost.append("tensor parallelism that hides its communication (enable_async_tensor_parallel): none is hidden here")
    converters = top.section("model").values.get("converters") or top.section("model").values.get("converter") or []
    for name in converters if isinstance(converters, list) else [converters]:
        if re.search(r"float8|mx|quant", str(name)):
            lost.append(f"products in less than 16 bits ({str(name)[:40]}): they are priced in bfloat16")
    if parallel.count("expert_tensor_parallel_degree") > 1:
        lost.append("experts that are cut over tp (expert_tensor_parallel_degree): each stays whole on its device here")
    return lost
