"""A row of a published table -> a run that the cost model can price, or the reason why it can't.

A run is refused, never guessed: what the model does not know (context and expert parallelism, fp8, a missing degree), what
is no measurement (failed runs), and what the source's own caveats exclude (README.md: tp above 8 in the nanotron sweep; its
runs under 10 % MFU are priced but told apart). Every refusal is counted under its reason.

Runs are split by *group*, the hash of (model, GPUs, tp, pp): about half of the groups are fitted on, the others
only reported on, so that no held-out run has a sibling of its own shape in the fit.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from benchmarks.models import Shape

VOCABULARY = 51200
"""Of vTrain's GPT runs, which do not tell theirs: Megatron's padded GPT-2 vocabulary."""


class Refused(Exception):
    """Why a row is not priced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A measured step and how it was laid out."""

    id: str
    source: str
    """Key into frameworks.yaml: a file's rows of one software generation."""
    hardware: str
    model: str
    shape: Shape
    layers: int
    gpus: int
    tp: int
    dp: int
    pp: int
    chunks: int
    sequence_parallel: bool
    zero: int
    stays: bool
    micro_batch: int
    global_batch: int
    recompute: str
    """none, full, "core" (attention's scores), "op" (all but half of the products), "alternate" (every second layer)."""
    dtype: str
    seconds: float
    memory: float | None
    group: str
    single_layer: bool = False

    @property
    def held_out(self) -> bool:
        return sha256(self.group.encode()).digest()[0] % 2 == 1

    @property
    def configuration(self) -> tuple[object, ...]:
        """What equal runs share: their differences are noise."""
        return (self.source, self.shape, self.layers, self.gpus, self.tp, self.dp, self.pp, self.chunks, self.sequence_parallel,
                self.zero, self.micro_batch, self.global_batch, self.recompute)  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run_of(row: dict[str, str]) -> Run:
    """The run of a row. Raises `Refused`."""
    source, hardware = _source(row)
    if row.get("status") != "ok":
        raise Refused("no measurement: the run failed")
    _modelled(row)
    seconds = float(row.get("step_time_s") or row.get("derived_step_time_s") or 0)
    tokens = float(row.get("tokens_per_s_per_gpu") or 0)
    gpus, batch, length = int(row["n_gpus"]), _number(row, "global_batch"), _number(row, "model_seq_len")
    if not seconds and tokens:
        seconds = batch * length / (tokens * gpus)
    if not seconds:
        raise Refused("no step time published")
    if source == "nanotron":  # runs under 10 % MFU are told apart: the source calls them pathological
        if int(row["tp"]) > 8:
            raise Refused("tp > 8: outside the source's caveats (README)")
        if float(row["mfu"]) < 0.1:
            source = "nanotron-slow"
    gated = row["model_gated"] == "True"
    heads = _number(row, "model_heads")
    unfused = source in ("megatron-2021", "megatron-2022", "megatron-2020", "vtrain")
    shape = Shape(
        gated=gated,
        hidden=_number(row, "model_hidden"),
        heads=heads,
        kv_heads=int(row.get("model_kv_heads") or heads),
        ffn=_number(row, "model_ffn"),
        vocab=int(row.get("model_vocab") or VOCABULARY),
        seq_len=length,
        tied=row.get("model_tied_embeddings", "True") == "True",
        unfused=unfused,
        dropout=0.1 if unfused else 0.0,
    )
    tp, pp, dp = (_number(row, axis) for axis in ("tp", "pp", "dp"))
    if tp * pp * dp != gpus:
        raise Refused("tp x pp x dp is not the number of GPUs")
    micro = _number(row, "micro_batch")
    if batch % (dp * micro):
        raise Refused("the global batch does not divide into the micro-batches told")
    memory = float(row.get("peak_mem") or 0)
    unit = 2**30 if row.get("peak_mem_unit") == "GiB" else 1e9
    return Run(
        id=row["id"],
        source=source,
        hardware=hardware,
        model=row["model"],
        shape=shape,
        layers=int(row.get("model_layers") or 1),
        gpus=gpus,
        tp=tp,
        dp=dp,
        pp=pp,
        chunks=int(row.get("vpp") or 1),
        sequence_parallel=tp > 1 and row.get("sp") == "True",
        zero=int(row.get("zero") or 0) if "FULL" not in row.get("fsdp", "") else 3,
        stays=row.get("fsdp") == "SHARD_GRAD_OP",
        micro_batch=micro,
        global_batch=batch,
        recompute=_recompute(row, source),
        dtype="float16" if row.get("precision") == "fp16" else "bfloat16",
        seconds=seconds,
        memory=memory * unit if memory else None,
        group=f"{row['model']}/{gpus}/{tp}/{pp}",
        single_layer="single layer" in row.get("other", ""),
    )


def _source(row: dict[str, str]) -> tuple[str, str]:
    """(source, hardware profile) of a row."""
    name, gpu = row["id"], row["gpu"]
    if name.startswith("narayanan") or name == "megatron-readme-175b-1024":
        return "megatron-2021", "a100-80g-sxm-8x"
    if name.startswith("korthikanti"):
        return "megatron-2022", "a100-80g-sxm-8x"
    if name.startswith("megatron2020"):
        return "megatron-2020", "a100-80g-sxm-8x" if gpu.startswith("A100") else ""
    if name.startswith("megatron-h100"):
        return "megatron-core", "h100-sxm-8x"
    if name.startswith("vtrain"):
        return "vtrain", "a100-80g-sxm-8x"
    if name.startswith("titan"):
        compiled = "-compile" if row.get("torch_compile") == "True" else ""
        if gpu.startswith("A100"):
            return "torchtitan-a100", "a100-80g-sxm-8x"
        return f"torchtitan{compiled}", "h100-hbm2e-500w-8x" if gpu.startswith("H100 9") else ""
    if name.startswith("simumax"):
        return "simumax", "b200-sxm-8x"
    for source in ("foundry", "nanotron"):
        if name.startswith(source):
            return {"foundry": "llm-foundry"}.get(source, source), "h100-sxm-8x"
    return name.split("-")[0], ""


def _modelled(row: dict[str, str]) -> None:
    if not _source(row)[1]:
        raise Refused(f"no hardware profile for {row['gpu']} in this software's context")
    if row.get("model_arch", "dense") not in ("dense", ""):
        raise Refused(f"{row['model_arch']}: expert parallelism is not modelled")
    if int(row.get("cp") or 1) > 1:
        raise Refused("context parallelism is not modelled")
    if "8" in row.get("precision", "").lower().replace("bf16", "").replace("fp16", "").replace("fp32", "") or row.get("float8"):
        raise Refused("fp8: no efficiency curve")
    if row.get("zero") == "3" and row["id"].startswith("narayanan"):
        raise Refused("DeepSpeed ZeRO-3 of 2021: another framework, six rows, no constants")


def _recompute(row: dict[str, str], source: str) -> str:
    said = row.get("recompute", "")
    if source.startswith("nanotron") or said.startswith("none"):
        return "none"
    if said.startswith("full"):
        return "full"
    if "attention core" in said:
        return "core"
    if "selective layer" in said:
        return "alternate"
    if said.startswith("selective"):
        return "op"
    raise Refused("recomputation is not told")


def _number(row: dict[str, str], name: str) -> int:
    try:
        return int(float(row.get(name, "")))
    except ValueError:
        raise Refused(f"{name} is not told") from None
