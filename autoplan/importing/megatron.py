"""Megatron-LM: a text of arguments of `pretrain_gpt.py`: one a line, a shell script's call, or the array of an export.

What is said of model and data is not read: the model stands beside the file. Distributed optimizer: ZeRO-1; Megatron FSDP's
`optim_grads` and `optim_grads_params`: 2 and 3.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from autoplan.errors import UsageError
from autoplan.importing.configuration import Configuration, Section
from autoplan.strategy import Zero

SHARDING: dict[str, Zero | None] = {"no_shard": None, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}
_LONGEST = 10_000
"""Layers of a pipeline layout."""

_BESIDE = {
    "fp8-format": "products in 8 bits: they are priced in 16",
    "fp4-format": "products in 4 bits: they are priced in 16",
    "tp-comm-overlap": "tensor parallelism that hides its communication: none is hidden here",
    "cpu-offloading": "activations on the CPU: they are priced on the device",
    "optimizer-cpu-offload": "optimizer states on the CPU: they are priced on the device",
    "use-precision-aware-optimizer": "optimizer states in fewer bits: they are priced in float32",
    "recompute-modules": "recomputation of single modules: it is not priced",
    "moe-expert-capacity-factor": "tokens dropped above a capacity: none are dropped here",
    "overlap-moe-expert-parallel-comm": "all-to-all that computation hides: none is hidden here",
    "delay-wgrad-compute": "gradients of weights that are computed later: they are computed at once here",
    "mtp-num-layers": "layers that predict further tokens: what the model has is priced",
    "hierarchical-context-parallel-sizes": "sequences split in two ways: one exchange of heads is priced",
}
"""Flag -> what is said of it."""


def looks_like(text: str) -> bool:
    """Whether a text holds such arguments."""
    return re.search(r"--(tensor-model-parallel-size|pipeline-model-parallel-size|micro-batch-size)\b", text) is not None


def configuration(path: Path, text: str) -> Configuration:
    """Raises `UsageError` naming flag and file."""
    flags = Section(path, _flags(path, text), "--")
    lost = [f"{sentence} (--{flag})" for flag, sentence in _BESIDE.items() if flag in flags.values]
    for flag in ("micro-batch-size", *(["num-layers"] if flags.has("pipeline-model-parallel-layout") else [])):
        if not flags.has(flag):
            raise UsageError(f"{path} does not say --{flag}.", f"Add --{flag} N.")
    tp, pp, cp = (flags.count(f"{axis}-parallel-size") for axis in ("tensor-model", "pipeline-model", "context"))
    ep = flags.count("expert-model-parallel-size")
    if cp > 1 and str(flags.values.get("cp-comm-type")) != "a2a":
        lost.append("keys and values that are passed round or gathered; an exchange of heads around attention (a2a) is priced")
    if ep > 1 and flags.count("expert-tensor-parallel-size", tp) > 1:
        lost.append("experts that are cut over tp: each stays whole on its device here (--expert-tensor-parallel-size 1)")
    return Configuration(
        path=path,
        trainer="Megatron-LM",
        gpus=_gpus(flags),
        pp=pp,
        cp=cp,
        tp=tp,
        ep=ep,
        sequence_parallel=tp > 1 and "sequence-parallel" in flags.values,
        micro_batch=flags.count("micro-batch-size"),
        local_batch=None if flags.has("global-batch-size") else flags.count("micro-batch-size"),
        global_batch=flags.maybe("global-batch-size"),
        layers=flags.maybe("num-layers"),
        tokens=flags.maybe("seq-length"),
        workload=_workload(flags, lost),
        **_data_parallel(flags, lost),
        **_recompute(flags, lost),
        **(_cut(flags, pp) if pp > 1 else {}),
        lost=tuple(lost),
    )


def _flags(path: Path, text: str) -> dict[str, Any]:
    """Flag -> its value; "" of one without."""
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise UsageError(f"{path} is no list of arguments: {str(error).lower()}.", "Close its quotes.") from None
    found: dict[str, Any] = {}
    flag = None
    for word in words:
        if re.match(r"--[a-zA-Z]", word):
            flag, equals, value = word[2:].partition("=")
            flag = flag.replace("_", "-")
            if flag in found:
                raise UsageError(f"{path}: '--{flag[:80]}' is given twice.", "Leave one of them.")
            found[flag] = value
            if equals:
                flag = None
        elif flag is not None and word not in (")", "|", "&&", ";"):
            if "$" in word and flag.endswith(("size", "layers", "layout", "node", "nodes")):
                raise UsageError(f"{path}: '--{flag[:80]}' is the variable {word[:40]}.", "Write its value.")
            found[flag], flag = word, None  # of several values the first: no flag that is read has more
        else:
            flag = None
    return {name: value if value else None if name in _COUNTS else "" for name, value in found.items()}


_COUNTS = frozenset(("micro-batch-size", "global-batch-size", "num-layers", "seq-length", "tensor-model-parallel-size"))
"""Flags that mean nothing without a value."""


def _gpus(flags: Section) -> int | None:
    """Of torchrun's own arguments, where the file is a whole call."""
    node = next((name for name in ("nproc-per-node",) if flags.has(name)), None)
    return flags.count(node) * flags.count("nnodes") if node and str(flags.values[node]).isdecimal() else None


def _data_parallel(flags: Section, lost: list[str]) -> dict[str, Any]:
    said = flags.values
    if "use-torch-fsdp2" in said:
        return {"dp_shard": None, "zero": 3}
    if "use-megatron-fsdp" in said or "use-custom-fsdp" in said:
        how = SHARDING[flags.word("data-parallel-sharding-strategy", "no_shard", tuple(SHARDING))]
        return {"dp_shard": None, "zero": how} if how else {"dp_replicate": None}
    if "use-distributed-optimizer" not in said:
        if flags.count("context-parallel-size") > 1:
            lost.append("states that are whole over cp: a plan splits them over it (ZeRO-1)")
        return {"dp_replicate": None, "zero": 1}
    return {"dp_replicate": flags.count("num-distributed-optimizer-instances"), "dp_shard": None, "zero": 1}


def _recompute(flags: Section, lost: list[str]) -> dict[str, Any]:
    if "recompute-activations" in flags.values and not flags.has("recompute-granularity"):
        how = "selective"
    else:
        how = flags.word("recompute-granularity", "none", ("none", "full", "selective"))
    if how == "selective":
        lost.append("selective recomputation, of attention's scores: fused attention keeps none, and none is recomputed here")
    if how != "full":
        return {}
    number = flags.count("recompute-num-layers")
    if flags.word("recompute-method", "uniform", ("uniform", "block")) == "block":
        return {"recompute_first": number}
    if number > 1:
        lost.append(f"{number} layers that are recomputed as one, of which one input is kept: each keeps its own here")
    return {"recompute_every": 1}


def _cut(flags: Section, pp: int) -> dict[str, Any]:
    """Schedule and stages."""
    if flags.values.get("pipeline-model-parallel-layout"):
        sizes = _layout(flags)
        if len(sizes) % pp:
            raise flags.wrong("pipeline-model-parallel-layout", f"a multiple of {pp} stages")
        return {**_schedule(len(sizes) // pp), "stage_sizes": sizes}
    weights = tuple(int(f"account-for-{part}-in-pipeline-split" in flags.values) for part in ("embedding", "loss"))
    chunks = flags.count("num-virtual-stages-per-pipeline-rank")
    each = flags.maybe("num-layers-per-virtual-pipeline-stage")
    if each is not None:
        return {"schedule": "interleaved-1f1b", "chunks": None, "layers_per_stage": each, "weights": weights}
    ends = [flags.maybe(f"decoder-{end}-pipeline-num-layers") for end in ("first", "last")]
    if any(ends):
        return {**_schedule(1), "stage_sizes": _ends(flags, pp, ends)}
    return {**_schedule(chunks), "weights": weights}


def _schedule(chunks: int) -> dict[str, Any]:
    return {"schedule": "interleaved-1f1b" if chunks > 1 else "1f1b", "chunks": chunks}


def _ends(flags: Section, pp: int, ends: list[int | None]) -> tuple[int, ...]:
    """The first and the last stage by hand, the others alike."""
    layers, others = flags.count("num-layers") - sum(size or 0 for size in ends), pp - sum(size is not None for size in ends)
    if (others == 0 and layers) or (others and (layers % others or layers < others)):
        key = f"decoder-{'first' if ends[0] else 'last'}-pipeline-num-layers"
        raise flags.wrong(key, f"a number that leaves the other {others} stages equally many layers")
    middle = [layers // others] * others if others else []
    return (*([ends[0]] if ends[0] else []), *middle, *([ends[1]] if ends[1] else []))


def _layout(flags: Section) -> tuple[int, ...]:
    """ "Et*4|t*4|(tt|)*2t*4L" as layers of every stage."""
    key = "pipeline-model-parallel-layout"
    text = re.sub(r"[\s,]", "", str(flags.values[key]))
    if len(text) > _LONGEST:
        raise flags.wrong(key, "a layout of a model that can be")
    for pattern in (r"\(([^()]*)\)\*(\d{1,5})", r"([Etm|])\*(\d{1,5})"):
        spread = sum(len(part) * int(number) for part, number in re.findall(pattern, text))
        if spread > _LONGEST:
            raise flags.wrong(key, "a layout of a model that can be")
        text = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), text)
    stages = text.split("|")
    if not re.fullmatch(r"E?[tm|]*L?", text) or not all("t" in stage for stage in stages):
        raise flags.wrong(key, "a layout of E, t, L and | with a layer in every stage, such as Et*4|t*4L")
    return tuple(stage.count("t") for stage in stages)


def _workload(flags: Section, lost: list[str]) -> dict[str, str]:
    said = flags.values
    name = flags.word("optimizer", "adam")
    found = {"optimizer": {"adam": "adamw", "sgd": "sgd_momentum"}.get(name, "adamw"), "param_dtype": "float32"}
    if name not in ("adam", "sgd"):
        lost.append(f"the optimizer {name[:40]}: AdamW is priced")
    compute = "bfloat16" if "bf16" in said else "float16" if "fp16" in said else "float32"
    if compute != "float32":
        lost.append(f"parameters that are kept in {compute} beside those in float32: two bytes each more than is priced")
    reduced = compute if "grad-reduce-in-bf16" in said or compute == "float16" else "float32"
    return {**found, "compute_dtype": compute, "reduce_dtype": reduced}
